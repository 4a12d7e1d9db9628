"""Advantages, weights, objectives, corrections and KL, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from cohort.learner.advantages import (
    advantages,
    all_equal,
    group_advantages,
    overlong_penalty,
    standard_deviation,
)
from cohort.learner.config import AlgorithmConfig
from cohort.learner.corrections import engine_weights, negative_mask, sequence_means
from cohort.learner.credit import token_weights
from cohort.learner.grpo import LossInputs, LossStats, policy_loss
from cohort.learner.objectives import (
    cispo_objective,
    clipped_objective,
    kl_penalty,
    tv_objective,
)

KINDS = {
    "zscore": ("mean", "group"),
    "centered": ("mean", "none"),
    "leave_one_out": ("leave_one_out", "none"),
}


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
        found = advantages(rewards, *KINDS[kind])
        assert found[0] == pytest.approx(first, abs=1e-6)
        assert found[-1] == pytest.approx(last, abs=1e-6)
        assert math.fsum(found) == pytest.approx(0, abs=1e-12)


def test_advantages_without_baseline_and_by_the_batch() -> None:
    assert advantages([1.0, 0.0, None], "none", "none") == [1.0, 0.0, None]
    assert advantages([0.5, 0.5], "none", "none") == [0.5, 0.5]
    assert advantages([1.0, 0.0], "mean", "batch", 0.25) == [2.0, -2.0]
    assert advantages([0.3, 0.3], "mean", "batch", 0.0) == [0.0, 0.0]
    assert standard_deviation([1, 0, 0, 0]) == pytest.approx(math.sqrt(3) / 4)
    with pytest.raises(ValueError, match="batch_std"):
        advantages([1.0, 0.0], "mean", "batch")


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(baseline: Any, scale: Any) -> None:
    for value in (0.1, 0.35, 1 / 3, 1e6, 0.0):
        assert advantages([value] * 8, baseline, scale, 1e-9) == [0.0] * 8


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.3, 0.1 + 0.2], True),
        ([0.3, 0.3 + 1e-9, None], True),
        ([float(torch.tensor(0.7)), 0.7], True),  # float32
        ([1e7, 1e7 + 1e-3], True),
        ([0.0, 1e-5], False),
        ([1e7, 1e7 + 1.0], False),
        ([1.0], False),
        ([1.0, None, math.nan], False),
        ([], False),
    ],
)
def test_equal_rewards_are_equal_but_for_rounding(rewards: Any, expected: bool) -> None:
    assert all_equal(rewards) == expected
    if expected:
        assert {a for a in advantages(rewards) if a is not None} == {0.0}


def test_a_kl_off_the_reward() -> None:
    """R = r - 0.1 KL, then as any reward; alone it is not brought to size 1."""
    keys: dict[str, Any] = dict(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    kl = [2.0, -1.0, 4.0, 0.0]
    for baseline, scale in KINDS.values():
        algorithm = AlgorithmConfig(**keys, baseline=baseline, scale=scale)
        found = group_advantages([1.0, 0.0, None, 0.5], algorithm, kl=kl)
        expected = advantages([0.8, 0.1, None, 0.5], baseline, scale)
        assert [a is None for a in found] == [False, False, True, False]
        assert [a for a in found if a is not None] == pytest.approx(
            [a for a in expected if a is not None]
        )
        alone = group_advantages([0.5] * 4, algorithm, kl=[1e-4, 0.0, 0.0, -1e-4])
        assert 0 < max(abs(a) for a in alone if a is not None) < 2e-5


def test_large_rewards_do_not_overflow() -> None:
    assert advantages([1e200, 0.0, 0.0, 0.0]) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_rounding_residue_does_not_blow_up() -> None:
    found = advantages([0.35] * 7 + [1.0])
    assert max(abs(a) for a in found) <= math.sqrt(8)
    assert found[-1] == pytest.approx(math.sqrt(7), abs=1e-6)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_invalid_rewards_stay_out(missing: float | None) -> None:
    with_gap = advantages([1.0, missing, 0.0, 0.0])
    assert with_gap[1] is None
    assert [a for a in with_gap if a is not None] == advantages([1.0, 0.0, 0.0])
    assert advantages([1.0, missing]) == [None, None]
    assert advantages([missing, missing], "mean", "none") == [None, None]
    assert advantages([missing, 0.5, 0.5], "mean", "none") == [None, 0.0, 0.0]


def test_advantages_do_not_depend_on_order_shift_or_scale() -> None:
    rewards = [0.2, 1.0, 0.7, 0.0]
    base = advantages(rewards)
    assert advantages(rewards[::-1]) == base[::-1]
    assert advantages([r + 3 for r in rewards]) == pytest.approx(base)
    assert advantages([r * 5 for r in rewards]) == pytest.approx(base)
    centered = advantages(rewards, "mean", "none")
    scaled = advantages([r * 5 for r in rewards], "mean", "none")
    assert scaled == pytest.approx([5 * a for a in centered])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Losses 14 and 19 in sum over lengths 5 and 10 are the RLHF book's example.
    [("token", 2.2), ("sequence", 2.35), ("constant", 1.65), ("prompt", 2.35)],
)
def test_aggregation(aggregation: Any, expected: float) -> None:
    losses = [14 / 5] * 5 + [19 / 10] * 10
    [[first], [second]] = token_weights([[5], [10]], aggregation, max_tokens=10)
    assert sum(w * x for w, x in zip([first] * 5 + [second] * 10, losses, strict=True)) == (
        pytest.approx(expected)
    )


def test_prompt_mean_weighs_prompts_alike() -> None:
    assert token_weights([[2, 6], [1]], "prompt", 99) == [[1 / 16, 1 / 16], [1 / 2]]
    assert token_weights([[2, 6], [1]], "sequence", 99) == [[1 / 6, 1 / 18], [1 / 3]]


def test_a_constant_is_over_all_that_was_sampled() -> None:
    assert token_weights([[2, 6], [1]], "constant", 10, sampled=8) == [[1 / 80] * 2, [1 / 80]]
    assert token_weights([[2, 6], [1]], "constant", 10) == [[1 / 30] * 2, [1 / 30]]
    for aggregation in ("token", "sequence", "prompt"):
        found = token_weights([[2, 6], [1]], aggregation, 10, sampled=8)
        assert found == token_weights([[2, 6], [1]], aggregation, 10)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(100, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1)]
)
def test_overlong_penalty_of_dapo(tokens: int, expected: float) -> None:
    assert overlong_penalty(tokens, 20480, 0.2) == pytest.approx(expected)
    assert overlong_penalty(tokens, 20480, 0.0) == 0


CLIP = [
    (1, 0.5, 0.5, 0.5),
    (1, 1, 1, 1),
    (1, 1.27, 1.27, 1.27),
    (1, 1.29, 1.28, 0),
    (1, 4, 1.28, 0),
    (-1, 0.5, -0.8, 0),
    (-1, 0.79, -0.8, 0),
    (-1, 0.81, -0.81, -0.81),
    (-1, 1.5, -1.5, -1.5),
]


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "slope", "dual"),
    [
        *((*case, dual) for case in CLIP for dual in (None, 3.0)),
        (-1, 4, -4, -4, None),
        (-1, 4, -3, 0, 3.0),
    ],
)
def test_clipped_objective(
    advantage: float, ratio: float, value: float, slope: float, dual: float | None
) -> None:
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    advantages_T = torch.tensor([advantage], dtype=torch.float64)
    objective, clipped = clipped_objective(log_ratio, advantages_T, 0.2, 0.28, dual)
    objective.sum().backward()
    assert objective.item() == pytest.approx(value)
    assert log_ratio.grad.item() == pytest.approx(slope)
    assert bool(clipped) == (slope == 0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1, 1), (4, 4), (7, 5)])
def test_cispo_keeps_every_token(advantage: float, ratio: float, weight: float) -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    log_ratio = now - (now.detach() - math.log(ratio))
    objective, capped = cispo_objective(now, log_ratio, torch.tensor([advantage]), 5.0)
    objective.sum().backward()
    assert now.grad.item() == pytest.approx(weight * advantage, rel=1e-5)
    assert bool(capped) == (ratio > 5)


@pytest.mark.parametrize(
    ("advantage", "before", "now", "kept"),
    [
        (1, 0.3, 0.49, True),
        (1, 0.3, 0.51, False),  # already 0.21 more probable
        (1, 0.9, 0.1, True),  # moved against its advantage: may come back
        (-1, 0.5, 0.31, True),
        (-1, 0.5, 0.29, False),
        (1, 0.001, 0.1, True),  # a ratio of 100, a probability of 0.1
    ],
)
def test_tv_bound_is_on_probabilities(
    advantage: float, before: float, now: float, kept: bool
) -> None:
    logprob = torch.tensor([now]).log().requires_grad_()
    log_ratio = logprob - math.log(before)
    objective, masked = tv_objective(logprob, log_ratio, torch.tensor([advantage]), 0.2, 0.2)
    objective.sum().backward()
    assert bool(masked) == (not kept)
    expected = now / before * advantage if kept else 0.0
    assert logprob.grad.item() == pytest.approx(expected, rel=1e-4)


# --- KL


@pytest.mark.parametrize(
    ("d", "k2", "k3"),
    [(1, 0.5, 0.367879), (-1, 0.5, 0.718282), (2, 2, 1.135335), (-2, 2, 4.389056)],
)
def test_kl_values_and_slopes_on_policy(d: float, k2: float, k3: float) -> None:
    for estimator, value in (("k2", k2), ("k3", k3)):
        now = torch.zeros(1, requires_grad=True)
        penalty = kl_penalty(now, torch.tensor([-float(d)]), now - now.detach(), estimator)
        penalty.sum().backward()
        assert penalty.item() == pytest.approx(value, abs=1e-5)
        # Both have the gradient d * grad log pi, that of the reverse KL.
        assert now.grad.item() == pytest.approx(d, abs=1e-5)


def test_k1_as_a_loss_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="k1"):
        kl_penalty(one, one, one, "k1")
    assert any("k1" in line for line in AlgorithmConfig(kl_estimator="k1").contradictions())


def two_token_policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a policy with gradient, of a reference and of a sampler: [state, token].

    State 0 is the start; state 1 + a follows the first token a. Vocabulary 4, two tokens.
    """
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    return draws[0].requires_grad_(), draws[1], draws[0].detach() + 0.3 * draws[2]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_kl_gradient_by_enumeration(estimator: Any, off_policy: bool) -> None:
    """The mean gradient over all samples is that of every state's exact KL(pi || ref)."""
    logits, reference, sampler = two_token_policies()
    mu = (sampler if off_policy else logits.detach()).log_softmax(-1)
    now, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    expected_loss = torch.zeros((), dtype=torch.float64)
    for state in range(5):
        for token in range(4):
            term = kl_penalty(
                now[state, token],
                ref[state, token],
                now[state, token] - mu[state, token],
                estimator,
            )
            expected_loss = expected_loss + mu[state, token].exp() * term
    (found,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    exact = (now.exp() * (now - ref)).sum()
    (gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, gradient)


def test_k3_without_the_ratio_would_pull_along_another_divergence() -> None:
    """What the ratio is for: leaving it out gives the forward KL's gradient."""
    logits, reference, _ = two_token_policies()
    now, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    d = now - ref
    plain = (now.detach().exp() * ((-d).exp() - 1 + d)).sum()
    (found,) = torch.autograd.grad(plain, logits, retain_graph=True)
    forward = (ref.exp() * (ref - now)).sum()
    (gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    torch.testing.assert_close(found, gradient)
    (exact,) = torch.autograd.grad((now.exp() * d).sum(), logits)
    assert not torch.allclose(found, exact, atol=1e-2)


def test_kl_in_the_reward_has_the_gradient_of_whole_sequences() -> None:
    """REINFORCE with reward -k1 summed: minus the gradient of KL over complete sequences."""
    logits, reference, _ = two_token_policies()
    now, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    surrogate = exact = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(4), repeat=2):
        logp = now[0, a] + now[1 + a, b]
        k1 = logp - ref[0, a] - ref[1 + a, b]
        surrogate = surrogate + logp.detach().exp() * k1.detach() * logp
        exact = exact + logp.exp() * k1
    (found,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, gradient)


# --- Corrections


def corrected(log_w: list[float], sequence: list[int], **keys: Any) -> list[float]:
    algorithm = AlgorithmConfig(**keys)
    mask = torch.ones(len(log_w), dtype=torch.bool)
    return engine_weights(torch.tensor(log_w), torch.tensor(sequence), mask, algorithm).tolist()


def test_token_corrections() -> None:
    log_w = [0.5, 1.0, 2.0, -1.0, 0.0]
    one = [0] * 5
    tis = corrected(log_w, one)
    assert tis == pytest.approx([1.648721, 2, 2, 0.367879, 1], abs=1e-5)
    icepop = corrected(log_w, one, correction="mask", correction_cap=5.0)
    assert icepop == pytest.approx([1.648721, 2.718282, 0, 0, 1], abs=1e-5)
    assert corrected(log_w, one, correction="off") == [1.0] * 5


def test_masks_of_whole_completions() -> None:
    log_w, sequence = [0.02, -0.02, 0.02, 0.02], [0, 0, 1, 1]
    keys = dict(correction="off", sequence_mask=(0.99, 1.01))
    assert corrected(log_w, sequence, **keys) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("advantage", "drift", "kept"), [(-1, -0.6, 0), (-1, -0.4, 1), (1, -0.6, 1), (-1, 0.6, 1)]
)
def test_negative_mask(advantage: float, drift: float, kept: float) -> None:
    found = negative_mask(
        torch.tensor([drift - 0.1, drift + 0.1]),
        torch.full((2,), float(advantage)),
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.bool),
        AlgorithmConfig(negative_mask=0.5),
    )
    assert found.tolist() == [kept, kept]


def test_the_negative_mask_is_not_on_the_kl() -> None:
    """DeepSeek-V3.2: the mask multiplies the objective; the KL pulls all the same."""
    now = torch.tensor([-3.0, -3.0], requires_grad=True)
    inputs: dict[str, Any] = dict(
        behaviour_T=torch.tensor([-1.0, -1.0]),
        advantage_T=torch.tensor([-1.0, -1.0]),
        weight_T=torch.tensor([0.5, 0.5]),
        sequence_T=torch.zeros(2, dtype=torch.long),
        reference_T=torch.tensor([-2.0, -2.5]),
    )
    keys: dict[str, Any] = dict(correction="off", negative_mask=0.5, kl_coef=0.1)
    loss, stats = policy_loss(LossInputs(now, **inputs), AlgorithmConfig(**keys))
    loss.backward()
    # The gradient of the KL is d = log pi - log ref.
    assert now.grad.tolist() == pytest.approx([0.05 * -1.0, 0.05 * -0.5])
    assert stats.corrected == 2


def test_a_mask_does_not_hide_what_is_not_finite() -> None:
    assert math.isnan(corrected([math.nan], [0], correction="mask")[0])
    # Without a weight the engine's log-probs are not used; a mask of whole completions keeps them.
    assert corrected([math.nan], [0], correction="off", sequence_mask=(0.9, 1.1)) == [1.0]


def test_the_mismatch_is_never_corrected_twice() -> None:
    """The ratio against the engine holds it; the weight, where there is one, holds it once."""
    now = torch.tensor([-1.0, -2.0], requires_grad=True)
    behaviour = torch.tensor([-1.3, -1.9])
    one, sequence = torch.ones(2), torch.zeros(2, dtype=torch.long)
    slopes = {}
    for name, keys in {
        "weight": {},
        "ratio": {"anchor": "engine", "correction": "off", "clip_low": 0.9, "clip_high": 9.0},
    }.items():
        now.grad = None
        loss, _ = policy_loss(
            LossInputs(now, behaviour, one, one / 2, sequence), AlgorithmConfig(**keys)
        )
        loss.backward()
        slopes[name] = now.grad.clone()
    w = (now.detach() - behaviour).exp()
    torch.testing.assert_close(slopes["weight"], -w / 2)
    torch.testing.assert_close(slopes["ratio"], -w / 2)
    [problem] = AlgorithmConfig(anchor="engine").contradictions()
    assert "twice" in problem
    assert AlgorithmConfig(preset="dppo_tv").contradictions() == []


# --- The loss


def loss_inputs(n: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    now = -torch.rand(n, generator=generator) * 3
    return {
        "logprobs_T": now.clone().requires_grad_(),
        "behaviour_T": now + torch.randn(n, generator=generator) * 0.1,
        "advantage_T": torch.randn(n, generator=generator),
        "weight_T": torch.full((n,), 1 / n),
        "sequence_T": torch.tensor([0, 1, 1, 1, 1, 2][:n]),
        "old_T": now + torch.randn(n, generator=generator) * 0.3,
        "reference_T": now + torch.randn(n, generator=generator) * 0.3,
        "entropy_T": torch.rand(n, generator=generator),
    }


def loss_of(inputs: dict[str, torch.Tensor], algorithm: AlgorithmConfig) -> Any:
    return policy_loss(LossInputs(**inputs), algorithm)


PRESETS = ["cohort", "grpo_paper", "r1", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "dppo_tv"]


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("grpo_paper", "r1")])
def test_on_policy_every_preset_is_reinforce_with_baseline(preset: Any) -> None:
    """pi = pi_old = mu: the gradient is -A grad log pi, and nothing is clipped or corrected."""
    inputs = loss_inputs()
    inputs.pop("old_T")
    inputs["behaviour_T"] = inputs["logprobs_T"].detach()
    if preset == "gspo":  # equal weights and advantages within a completion
        inputs["advantage_T"] = inputs["advantage_T"][[0, 1, 1, 1, 1, 5]]
    loss, stats = loss_of(inputs, AlgorithmConfig(preset=preset))
    loss.backward()
    expected = -inputs["advantage_T"] * inputs["weight_T"]
    torch.testing.assert_close(inputs["logprobs_T"].grad, expected)
    assert (stats.clipped, stats.k3, stats.log_ratio_abs_max) == (0, 0, 0)
    assert (stats.corrected, stats.engine_ratio) == (0, 6)


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient_do_not_depend_on_the_split(preset: Any) -> None:
    algorithm = AlgorithmConfig(preset=preset, entropy_coef=0.1)
    inputs = loss_inputs()
    whole, whole_stats = loss_of(inputs, algorithm)
    whole.backward()
    gradient = inputs["logprobs_T"].grad.clone()
    inputs["logprobs_T"].grad = None
    stats = LossStats()
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        shared = {name: value[part] for name, value in inputs.items()}
        shared["sequence_T"] = shared["sequence_T"] - shared["sequence_T"].min()
        loss, seen = loss_of(shared, algorithm)
        loss.backward()
        stats += seen
    torch.testing.assert_close(inputs["logprobs_T"].grad, gradient)
    for name, value in vars(whole_stats).items():
        assert getattr(stats, name) == pytest.approx(value, abs=1e-5)


def test_sequence_ratio_is_the_geometric_mean() -> None:
    log_ratio = torch.tensor([0.1, -0.2, 0.3, 5.0])
    sequence, mask = torch.tensor([0, 0, 0, 1]), torch.tensor([True] * 4)
    found = sequence_means(log_ratio, sequence, mask).exp()
    assert found[0].item() == pytest.approx(1.068939, abs=1e-6)
    assert found[3].item() == pytest.approx(math.exp(5), rel=1e-5)
    masked = sequence_means(log_ratio, sequence, torch.tensor([True, False, True, False]))
    assert masked.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.0])


def test_gspo_gradient_by_autograd_of_its_definition() -> None:
    """min(s A, clip(s) A), s = (prod pi / pi_old)^(1/T), mean over completions."""
    inputs = loss_inputs()
    inputs["behaviour_T"] = inputs["old_T"]
    inputs["advantage_T"] = torch.tensor([1.0, -0.5, -0.5, -0.5, -0.5, 2.0])
    lengths = [1, 4, 1]
    inputs["weight_T"] = torch.tensor([1 / (3 * n) for n in lengths for _ in range(n)])
    algorithm = AlgorithmConfig(preset="gspo", clip_low=0.2, clip_high=0.3)
    loss, _ = loss_of(inputs, algorithm)
    (found,) = torch.autograd.grad(loss, inputs["logprobs_T"])
    now = inputs["logprobs_T"]
    pieces = zip(now.split(lengths), inputs["old_T"].split(lengths), (1.0, -0.5, 2.0), strict=True)
    expected = torch.zeros(())
    for segment, old, advantage in pieces:
        s = (segment.sum() - old.sum()).div(len(segment)).exp()
        expected = expected - torch.minimum(s * advantage, s.clamp(0.8, 1.3) * advantage) / 3
    (gradient,) = torch.autograd.grad(expected, now)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(found, gradient)


def test_dr_grpo_times_g_over_g_minus_one_is_rloo() -> None:
    rewards = [0.0, 1.0, 0.25, 1.0]
    centered = advantages(rewards, "mean", "none")
    left_out = advantages(rewards, "leave_one_out", "none")
    assert left_out == pytest.approx([a * 4 / 3 for a in centered])


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("mean", 0.75)])
def test_bandit_gradient_is_unbiased_up_to_the_baseline(baseline: Any, factor: float) -> None:
    """Three arms, groups of four, all 81 groups: the mean estimate is the exact gradient."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    reward = [1.0, 0.0, 0.4]
    logp = logits.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(3), repeat=4):
        probability = math.exp(sum(logp.tolist()[arm] for arm in group))
        values = advantages([reward[arm] for arm in group], baseline, "none")
        for arm, value in zip(group, values, strict=True):
            total = total + probability * value * logp[arm] / 4
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    exact = (logp.exp() * torch.tensor(reward, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, gradient * factor)


def test_truncated_weights_reduce_the_bias_of_another_engine() -> None:
    """Samples of a biased engine, by enumeration: with w the gradient is the policy's own."""
    logits = torch.tensor([0.2, -0.4, 0.6], requires_grad=True)
    engine = torch.tensor([0.6, -0.6, 0.2]).log_softmax(-1)
    values = torch.tensor([1.0, -1.0, 0.3])

    def gradient(**keys: Any) -> torch.Tensor:
        now = logits.log_softmax(-1)
        # Every token once, weighted by how often the engine samples it.
        inputs = LossInputs(now, engine, values, engine.exp(), torch.arange(3))
        loss, _ = policy_loss(inputs, AlgorithmConfig(**keys))
        return torch.autograd.grad(loss, logits)[0]

    now = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(-(now.exp() * values).sum(), logits)
    torch.testing.assert_close(gradient(), exact)  # every w is below the cap
    assert (gradient(correction="off") - exact).norm() > 0.05


def test_masked_tokens_give_nothing_and_no_nan() -> None:
    for preset in PRESETS:
        now = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
        bad = torch.tensor([-1.0, -1e4, math.nan])
        inputs = LossInputs(
            now,
            bad,
            torch.tensor([1.0, 1.0, math.nan]),
            torch.tensor([1.0, 0, 0]),
            torch.tensor([0, 1, 2]),
            reference_T=bad,
            entropy_T=torch.tensor([1.0, math.nan, 1.0]),
        )
        loss, stats = policy_loss(inputs, AlgorithmConfig(preset=preset))
        loss.backward()
        # CISPO's value is A log pi; the others' is A, and no KL where nothing differs.
        assert loss.item() == pytest.approx(1.0 if preset == "cispo" else -1.0)
        assert now.grad.tolist() == [-1.0, 0.0, 0.0]
        assert (stats.tokens, stats.log_ratio_abs_max, stats.kl, stats.entropy) == (1, 0, 0, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_extreme_ratio_stays_finite(preset: Any) -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    far = torch.tensor([-900.0])
    algorithm = AlgorithmConfig(preset=preset)
    one, sequence = torch.ones(1), torch.zeros(1, dtype=torch.long)
    inputs = LossInputs(now, far, -one, one, sequence, old_T=far, reference_T=far)
    loss, stats = policy_loss(inputs, algorithm)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(now.grad.item())
    inputs = LossInputs(now, far, one, one, sequence, reference_T=far)
    loss, stats = policy_loss(inputs, algorithm)
    assert stats.log_ratio_abs_max == 899


def test_entropy_bonus_and_missing_inputs() -> None:
    inputs = loss_inputs()
    inputs["entropy_T"].requires_grad_()
    loss, _ = loss_of(inputs, AlgorithmConfig(entropy_coef=0.5))
    (slope,) = torch.autograd.grad(loss, inputs["entropy_T"])
    torch.testing.assert_close(slope, -0.5 * inputs["weight_T"])
    for key, name in (("entropy_coef", "entropy_T"), ("kl_coef", "reference_T")):
        with pytest.raises(ValueError, match=key):
            loss_of({n: v for n, v in inputs.items() if n != name}, AlgorithmConfig(**{key: 0.1}))


def test_k3_is_the_divergence_on_average() -> None:
    """Samples from the engine: the mean of k3 is KL(engine || learner), here by enumeration."""
    engine = torch.tensor([0.5, 0.3, 0.2]).log()
    learner = torch.tensor([0.2, 0.5, 0.3]).log()
    expected = float((engine.exp() * (engine - learner)).sum())
    found = 0.0
    for token in range(3):
        one = torch.ones(1)
        inputs = LossInputs(
            learner[token : token + 1],
            engine[token : token + 1],
            one,
            one,
            torch.zeros(1, dtype=torch.long),
        )
        _, stats = policy_loss(inputs, AlgorithmConfig())
        assert stats.k3 >= 0
        found += float(engine[token].exp()) * stats.k3
    assert found == pytest.approx(expected, abs=1e-6)


def test_nan_stays_visible_in_pooled_statistics() -> None:
    bad = LossStats(tokens=1, loss=math.nan, log_ratio_abs_max=math.nan)
    for pooled in (bad + LossStats(tokens=1), LossStats(tokens=1) + bad):
        assert math.isnan(pooled.loss)
        assert math.isnan(pooled.log_ratio_abs_max)
