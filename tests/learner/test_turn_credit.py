"""Rewards of turns -> advantages of turns, and what an episode is to everything else."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cohort.actors.turns import TurnShape
from cohort.learner.advantages import group_advantages, turn_advantages
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import AlgorithmConfig
from cohort.learner.credit import informative
from cohort.learner.grpo import policy_loss
from cohort.learner.packing import Packer
from cohort.learner.plan import StepPlan, plan_step, score_batches
from cohort.learner.step import reference_kl
from tests.learner.episodes import CHAIN, FORKS, episode_group, episode_metas
from tests.learner.helpers import metas, scored_group

TURN = AlgorithmConfig(credit="turn")
KL = AlgorithmConfig(credit="turn", kl_coef=0.5, kl_in="reward", kl_estimator="k1")
ONE = (TurnShape(None, 6, 0, 4),)


def planned(pairs: list[Any], algorithm: AlgorithmConfig, **options: Any) -> StepPlan:
    kl = options.pop("kl", None)
    packer = Packer(**{"ranks": 1, "micro_batch_tokens": 8192, **options})
    return plan_step(pairs, algorithm, packer, max_tokens=32, kl=kl)


def of_turns(plan: StepPlan) -> dict[str, tuple[float, ...]]:
    """The advantages of the turns of every completion that is trained, the only one first."""
    segments = [s for shard in plan.updates[0] for batch in shard for s in batch.segments]
    return {s.completion_id: s.turn_advantages or (s.advantage,) for s in segments}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_turns_the_long_way(seed: int, baseline: Any, scale: Any) -> None:
    generator = random.Random(seed)
    rewards: list[Any] = [
        tuple(generator.uniform(-2, 2) for _ in range(generator.randint(1, 5))) for _ in range(4)
    ]
    rewards[2] = None
    flat = np.array([reward for turns in rewards if turns for reward in turns])
    algorithm = AlgorithmConfig(credit="turn", baseline=baseline, scale=scale)
    found = turn_advantages(rewards, algorithm, 0.7)
    std = {"group": flat.std(), "batch": 0.7, "none": 1.0}[scale]
    for turns, values in zip(rewards, found, strict=True):
        if turns is None:
            assert values is None
            continue
        for t in range(len(turns)):
            expected = 0.0
            for reward in turns[t:]:
                others = (flat.sum() - reward) / (len(flat) - 1)
                base = {"mean": flat.mean(), "leave_one_out": others, "none": 0.0}[baseline]
                expected += (reward - base) / std
            assert values[t] == pytest.approx(expected)


def test_equal_turn_rewards_give_exactly_nothing() -> None:
    thirds = [(0.1 + 0.2, 0.3), (0.3, 0.3, 0.3)]
    assert turn_advantages(thirds, TURN) == [(0.0, 0.0), (0.0, 0.0, 0.0)]
    group = episode_group("a", [CHAIN, CHAIN], [0.0, 0.0])
    pair = episode_metas(group, [(0.3, 0.3, 0.3), (0.1 + 0.2, 0.3, 0.3)])
    assert not informative(*pair, TURN)
    assert planned([pair], TURN).groups_filtered == 1
    kept = AlgorithmConfig(credit="turn", drop_zero_variance=False)
    assert set(of_turns(planned([pair], kept)).values()) == {(0.0, 0.0, 0.0)}


def test_equal_totals_of_unequal_turns_are_a_signal_for_turns_alone() -> None:
    group = episode_group("a", [CHAIN, CHAIN], [0.0, 0.0])
    pair = episode_metas(group, [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
    assert planned([pair], AlgorithmConfig()).groups_filtered == 1
    assert planned([pair], TURN).groups_trained == 1


def test_an_episode_alone_or_without_a_number_is_not_trained() -> None:
    assert turn_advantages([(0.0, 1.0), None], TURN) == [None, None]
    found = turn_advantages([(0.0, 1.0), (float("nan"), 1.0), (1.0,)], TURN)
    assert found[1] is None
    assert found[0] is not None
    group = episode_group("a", [CHAIN, (), CHAIN], [1.0, None, 0.0])
    plan = planned([episode_metas(group, [(0.0, 1.0, 0.0), (), (0.0, 0.0, 0.0)])], TURN)
    assert (plan.trained, plan.failed, set(of_turns(plan))) == (2, 1, {"a/0", "a/2"})


def test_what_is_not_the_environments_counts_to_the_last_turn() -> None:
    group = episode_group("a", [CHAIN, CHAIN], [0.5, 0.0])
    plain = AlgorithmConfig(credit="turn", baseline="none", scale="none")
    pair = episode_metas(group, [(1.0, 0.0, 2.0), (0.0, 4.0, 0.0)])
    assert of_turns(planned([pair], plain)) == {"a/0": (3.5, 2.5, 2.5), "a/1": (4.0, 4.0, 0.0)}
    # The length penalty, over the last tokens of 32: eight tokens are within it, by half.
    short = AlgorithmConfig(credit="turn", baseline="none", scale="none", overlong_buffer=1.0)
    found = of_turns(planned([pair], short))
    assert found["a/0"] == pytest.approx((3.25, 2.25, 2.25))
    kl = {"a/0": 1.0, "a/1": -2.0}
    keys = {"baseline": "none", "scale": "none"}
    found = of_turns(planned([pair], KL.model_copy(update=keys), kl=kl))
    assert found == {"a/0": (3.0, 2.0, 2.0), "a/1": (5.0, 5.0, 1.0)}


def test_a_kl_off_equal_turn_rewards_keeps_its_size() -> None:
    group = episode_group("a", [CHAIN, CHAIN], [0.0, 0.0])
    pair = episode_metas(group, [(0.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
    kept = KL.model_copy(update={"drop_zero_variance": False})
    found = of_turns(planned([pair], kept, kl={"a/0": 0.006, "a/1": 0.0}))
    # -0.003 and five zeros, less their mean, and not divided by their standard deviation.
    assert found["a/0"][2] == pytest.approx(-0.0025)
    assert found["a/0"][0] == pytest.approx(-0.0015)


def test_the_scale_of_the_batch_is_of_all_turn_rewards_that_are_trained() -> None:
    one = episode_group("a", [CHAIN, CHAIN], [0.0, 0.0])
    other = episode_group("bb", [ONE, CHAIN], [0.0, 0.0])
    flat = episode_group("ccc", [ONE, ONE], [9.0, 9.0])
    turns = [[(0.0, 1.0, 0.0), (0.0, 0.0, 0.0)], [(3.0,), (0.0, 0.0, 1.0)], [(0.0,), (0.0,)]]
    pairs = [episode_metas(g, r) for g, r in zip((one, other, flat), turns, strict=True)]
    found = of_turns(planned(pairs, AlgorithmConfig(credit="turn", scale="batch")))
    rewards = np.array([0, 1, 0, 0, 0, 0, 3, 0, 0, 1])
    assert found["bb/0"] == pytest.approx(((3 - 1) / rewards.std(),))


def test_without_an_environment_a_completion_is_one_turn() -> None:
    group = scored_group("a", [1.0, 0.0, 0.3, None], [3, 4, 5, 6])
    assert planned([metas(group)], TURN) == planned([metas(group)], AlgorithmConfig())
    rewards = [1.0, 0.0, 0.3, None]
    whole = group_advantages(rewards, AlgorithmConfig())
    by_turn = turn_advantages([None if r is None else (r,) for r in rewards], TURN)
    assert by_turn == [None if value is None else (value,) for value in whole]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "prompt", "constant"])
def test_only_sampled_tokens_are_in_a_normaliser(aggregation: Any, shared: bool) -> None:
    group = episode_group("a", [FORKS, CHAIN], [1.0, 0.0])
    own = [tuple(float(t) for t in range(len(FORKS))), (0.0, 1.0, 0.0)]
    algorithm = AlgorithmConfig(credit="turn", aggregation=aggregation)
    plan = planned([episode_metas(group, own)], algorithm, share_prompts=shared)
    long, short = (sum(turn.sampled for turn in turns) for turns in (FORKS, CHAIN))
    [[[batch]]] = plan.updates
    tensors = build_micro_batch(batch, {"a": group})
    assert plan.trained_tokens == len(tensors.target_T) == long + short
    expected = {
        "token": [1 / (long + short)] * 2,
        "prompt": [1 / (long + short)] * 2,
        "sequence": [1 / (2 * long), 1 / (2 * short)],
        "constant": [1 / (2 * 32)] * 2,
    }[aggregation]
    start = 0
    for segment in batch.segments:
        i = int(segment.completion_id[-1])
        places = segment.layout(6).places
        assert len(places) > 0
        for place in places:
            end = start + segment.turns[place.turn].sampled
            value = segment.turn_advantages[place.turn]
            assert tensors.advantage_T[start:end].tolist() == pytest.approx([value] * (end - start))
            assert tensors.weight_T[start:end].tolist() == pytest.approx(
                [expected[i]] * (end - start)
            )
            start = end
    assert start == len(tensors.target_T)


@pytest.mark.parametrize("shared", [True, False])
def test_an_episode_has_one_ratio_and_one_kl(shared: bool) -> None:
    """However many rows its tokens lie in."""
    group = episode_group("a", [FORKS, CHAIN], [1.0, 0.0])
    pair = episode_metas(group, [(0.0,) * len(FORKS), (0.0,) * 3])
    gspo = AlgorithmConfig(preset="gspo", anchor="engine", clip_low=9.0, clip_high=9.0)
    plan = planned([pair], gspo, share_prompts=shared, micro_batch_tokens=16)
    losses = []
    for [batch] in zip(*plan.updates[0], strict=True):
        tensors = build_micro_batch(batch, {"a": group})
        now = -4.0 + 0.01 * tensors.target_T
        losses.append(policy_loss(tensors.loss_inputs(now), gspo)[0])
    expected = 0.0
    for completion, advantage in zip(group.group.completions, (1.0, -1.0), strict=True):
        ratios = -4.0 + 0.01 * completion.token_ids - completion.logprobs
        expected -= advantage * float(np.exp(ratios.mean())) / 2
    assert float(sum(losses)) == pytest.approx(expected, rel=1e-5)

    state: Any = SimpleNamespace(
        device=torch.device("cpu"),
        spec=SimpleNamespace(temperature=1.0),
        reference=SimpleNamespace(logprobs=lambda inputs, *_: -0.1 * inputs.target_T),
    )
    packer = Packer(ranks=1, micro_batch_tokens=16, share_prompts=shared)
    [batches] = score_batches([pair[0]], packer)
    found = reference_kl(state, batches, {"a": group})
    for completion in group.group.completions:
        k1 = (completion.logprobs + 0.1 * completion.token_ids).sum()
        assert found[completion.id] == pytest.approx(float(k1), rel=1e-5)


def test_what_makes_no_sense_is_refused() -> None:
    [problem] = AlgorithmConfig(preset="gspo", credit="turn").contradictions()
    assert "algorithm.credit=turn" in problem
    assert "algorithm.ratio=token" in problem
    [problem] = AlgorithmConfig(objective="cross_entropy", credit="turn").contradictions()
    assert problem.startswith("algorithm.credit=turn")
    assert TURN.contradictions() == []


def test_turns_and_their_rewards_must_agree() -> None:
    group = episode_group("a", [CHAIN, CHAIN], [1.0, 0.0])
    with pytest.raises(ValueError, match="have rewards"):
        planned([episode_metas(group, [(0.0, 1.0), (0.0, 0.0, 0.0)])], AlgorithmConfig())
