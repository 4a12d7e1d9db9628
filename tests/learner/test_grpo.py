"""Advantages, weights and the clipped loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from learner.grpo import LossStats, advantages, clipped_objective, policy_loss, token_weights


@pytest.mark.parametrize(
    ("rewards", "zscore", "centered", "leave_one_out"),
    [
        ([1, 0, 0, 0], (1.732051, -0.577350), (0.75, -0.25), (1, -0.333333)),
        ([1, 1, 0, 0], (1, -1), (0.5, -0.5), (0.666667, -0.666667)),
        ([1] * 7 + [0], (0.377964, -2.645751), (0.125, -0.875), (0.142857, -1)),
    ],
)
def test_advantages(
    rewards: list[float],
    zscore: tuple[float, float],
    centered: tuple[float, float],
    leave_one_out: tuple[float, float],
) -> None:
    expected = {"zscore": zscore, "centered": centered, "leave_one_out": leave_one_out}
    for kind, (first, last) in expected.items():
        found = advantages(rewards, kind)
        assert found[0] == pytest.approx(first, abs=1e-6)
        assert found[-1] == pytest.approx(last, abs=1e-6)
        assert math.fsum(found) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["zscore", "centered", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(kind: str) -> None:
    for value in (0.1, 0.35, 1 / 3, 1e6, 0.0):
        assert advantages([value] * 8, kind) == [0.0] * 8


def test_rounding_residue_does_not_blow_up() -> None:
    found = advantages([0.35] * 7 + [1.0], "zscore")
    assert max(abs(a) for a in found) <= math.sqrt(8)
    assert found[-1] == pytest.approx(math.sqrt(7), abs=1e-6)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_invalid_rewards_stay_out(missing: float | None) -> None:
    with_gap = advantages([1.0, missing, 0.0, 0.0], "zscore")
    assert with_gap[1] is None
    assert [a for a in with_gap if a is not None] == advantages([1.0, 0.0, 0.0], "zscore")
    assert advantages([1.0, missing], "zscore") == [None, None]
    assert advantages([missing, missing], "centered") == [None, None]
    assert advantages([missing, 0.5, 0.5], "centered") == [None, 0.0, 0.0]


def test_advantages_do_not_depend_on_order_shift_or_scale() -> None:
    rewards = [0.2, 1.0, 0.7, 0.0]
    base = advantages(rewards, "zscore")
    assert advantages(rewards[::-1], "zscore") == base[::-1]
    assert advantages([r + 3 for r in rewards], "zscore") == pytest.approx(base)
    assert advantages([r * 5 for r in rewards], "zscore") == pytest.approx(base)
    centered = advantages(rewards, "centered")
    scaled = advantages([r * 5 for r in rewards], "centered")
    assert scaled == pytest.approx([5 * a for a in centered])


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("token", 2.2), ("sequence", 2.35), ("constant", 1.65)]
)
def test_aggregation(aggregation: str, expected: float) -> None:
    """Lengths 5 and 10, losses 14 and 19 in sum: the RLHF book's example."""
    losses = [14 / 5] * 5 + [19 / 10] * 10
    first, second = token_weights([5, 10], aggregation, max_tokens=10)
    assert sum(w * x for w, x in zip([first] * 5 + [second] * 10, losses, strict=True)) == (
        pytest.approx(expected)
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "slope"),
    [
        (1, 0.5, 0.5, 0.5),
        (1, 1, 1, 1),
        (1, 1.27, 1.27, 1.27),
        (1, 1.29, 1.28, 0),
        (1, 4, 1.28, 0),
        (-1, 0.5, -0.8, 0),
        (-1, 0.79, -0.8, 0),
        (-1, 0.81, -0.81, -0.81),
        (-1, 1.5, -1.5, -1.5),
        (-1, 4, -4, -4),
    ],
)
def test_clipped_objective(advantage: float, ratio: float, value: float, slope: float) -> None:
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    objective, clipped = clipped_objective(log_ratio, torch.tensor([advantage]), 0.2, 0.28)
    objective.sum().backward()
    assert objective.item() == pytest.approx(value)
    assert log_ratio.grad.item() == pytest.approx(slope)
    assert bool(clipped) == (slope == 0)


def loss_inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    now = (-torch.rand(n, generator=generator) * 3).requires_grad_()
    behaviour = now.detach() + torch.randn(n, generator=generator) * 0.1
    return now, behaviour, torch.randn(n, generator=generator), torch.full((n,), 1 / n)


def test_on_policy_is_reinforce_with_baseline() -> None:
    now, _, advantage, weight = loss_inputs()
    loss, stats = policy_loss(now, now.detach(), advantage, weight, 0.2, 0.28)
    loss.backward()
    torch.testing.assert_close(now.grad, -advantage * weight)
    assert loss.item() == pytest.approx(-float(advantage.mean()), abs=1e-6)
    assert (stats.clipped, stats.k3, stats.log_ratio_abs_max) == (0, 0, 0)


def test_loss_and_gradient_do_not_depend_on_the_split() -> None:
    now, behaviour, advantage, weight = loss_inputs()
    whole, whole_stats = policy_loss(now, behaviour, advantage, weight, 0.2, 0.28)
    whole.backward()
    gradient = now.grad.clone()
    now.grad = None
    stats = LossStats()
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        loss, seen = policy_loss(
            now[part], behaviour[part], advantage[part], weight[part], 0.2, 0.28
        )
        loss.backward()
        stats += seen
    torch.testing.assert_close(now.grad, gradient)
    for name, value in vars(whole_stats).items():
        assert getattr(stats, name) == pytest.approx(value, abs=1e-6)


def test_masked_tokens_give_nothing_and_no_nan() -> None:
    now = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -1e4, math.nan])
    loss, stats = policy_loss(
        now, behaviour, torch.tensor([1.0, 1.0, math.nan]), torch.tensor([1.0, 0, 0]), 0.2, 0.28
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1)
    assert now.grad.tolist() == [-1.0, 0.0, 0.0]
    assert (stats.tokens, stats.log_ratio_abs_max) == (1, 0)


def test_extreme_ratio_stays_finite() -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    loss, stats = policy_loss(
        now, torch.tensor([-900.0]), torch.tensor([-1.0]), torch.ones(1), 0.2, 0.28
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(now.grad.item())
    assert stats.log_ratio_abs_max == 899


def test_k3_is_the_divergence_on_average() -> None:
    """Samples from the engine: the mean of k3 is KL(engine || learner), here by enumeration."""
    engine = torch.tensor([0.5, 0.3, 0.2]).log()
    learner = torch.tensor([0.2, 0.5, 0.3]).log()
    expected = float((engine.exp() * (engine - learner)).sum())
    found = 0.0
    for token in range(3):
        one = torch.ones(1)
        _, stats = policy_loss(
            learner[token : token + 1], engine[token : token + 1], one, one, 0.2, 0.28
        )
        assert stats.k3 >= 0
        found += float(engine[token].exp()) * stats.k3
    assert found == pytest.approx(expected, abs=1e-6)


def test_nan_stays_visible_in_pooled_statistics() -> None:
    bad = LossStats(tokens=1, loss=math.nan, log_ratio_abs_max=math.nan)
    for pooled in (bad + LossStats(tokens=1), LossStats(tokens=1) + bad):
        assert math.isnan(pooled.loss)
        assert math.isnan(pooled.log_ratio_abs_max)
