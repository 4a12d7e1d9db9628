"""The planner: every completion once, budgets kept, equal work, nothing lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cohort.actors.records import ScoredGroup
from cohort.learner.attention import Tree
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import AlgorithmConfig
from cohort.learner.credit import informative, zero_variance
from cohort.learner.packing import MicroBatch, Packer, RowCost, Segment
from cohort.learner.plan import StepPlan, plan_step, score_batches
from cohort.learner.shapes import Join, RowShape
from tests.learner.helpers import metas, scored_group


def plan(groups: list[ScoredGroup], **options: object) -> StepPlan:
    arguments: dict = dict(ranks=1, micro_batch_tokens=64) | options
    algorithm = arguments.pop("algorithm", AlgorithmConfig())
    kl = arguments.pop("kl", None)
    pairs = [metas(g) for g in groups]
    return plan_step(pairs, algorithm, Packer(**arguments), max_tokens=32, kl=kl)


def random_groups(seed: int, count: int = 7) -> list[ScoredGroup]:
    generator = random.Random(seed)
    groups = []
    for i in range(count):
        size = generator.randint(2, 9)
        groups.append(
            scored_group(
                f"{seed}-{i}",
                [generator.choice([0.0, 0.5, 1.0, 1.0, None]) for _ in range(size)],
                [generator.choice([0, 1, 2, 5, 17, 40, 90]) for _ in range(size)],
                prompt_tokens=generator.choice([1, 8, 30, 70]),
            )
        )
    return groups


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_plan_invariants(seed: int, ranks: int) -> None:
    groups = random_groups(seed)
    budget = [16, 64, 200, 5000][seed % 4]
    found = plan(groups, ranks=ranks, micro_batch_tokens=budget, logit_chunk_tokens=8)
    rows = [row for shard in found.updates[0] for batch in shard for row in batch.rows]
    ids = [segment.completion_id for row in rows for segment in row.segments]
    assert len(ids) == len(set(ids)) == found.trained
    samples = sum(len(g.totals) for g in groups)
    assert found.trained + found.filtered + found.failed == samples
    assert found.groups_trained + found.groups_filtered + found.groups_failed == len(groups)

    sizes = {c.id: len(c.token_ids) for g in groups for c in g.group.completions}
    owner = {c.id: g for g in groups for c in g.group.completions}
    for row in rows:
        for segment in row.segments:
            assert segment.tokens == sizes[segment.completion_id] > 0
            assert owner[segment.completion_id].group.id == row.group_id
        assert row.length <= budget or len(row.segments) == 1
    weight = sum(p.weight * p.tokens for row in rows for p in row.segments)
    assert weight == pytest.approx(1.0 if rows else 0.0)

    assert len({len(shard) for shard in found.updates[0]}) == 1
    for position in zip(*found.updates[0], strict=True):
        assert any(batch.rows for batch in position)
        assert len({batch.chunks for batch in position}) == 1
        for batch in position:
            assert batch.padded_tokens <= budget or len(batch.rows) == 1
            assert sum(row.completion_tokens for row in batch.rows) <= 8 * batch.chunks


def test_prompt_is_stored_once_where_that_is_less_work() -> None:
    long_prompt = scored_group("a", [0.0, 1.0, 0.0, 1.0], [4, 4, 4, 4], prompt_tokens=50)
    found = plan([long_prompt], micro_batch_tokens=1000)
    assert found.row_tokens == 50 + 16
    # Where attention is dear and the prompt is short, long completions stay apart.
    short_prompt = scored_group("a", [0.0, 1.0, 0.0, 1.0], [40] * 4, prompt_tokens=2)
    found = plan([short_prompt], micro_batch_tokens=1000, cost=RowCost(quadratic=0.1))
    assert found.row_tokens == 4 * 42


def test_without_a_mask_long_rows_are_no_more_work() -> None:
    group = scored_group("a", [0.0, 1.0, 0.0, 1.0], [40] * 4, prompt_tokens=2)
    found = plan([group], micro_batch_tokens=1000, cost=RowCost(quadratic=0.1, masked=False))
    assert found.row_tokens == 2 + 4 * 40
    alone = plan([group], micro_batch_tokens=1000, share_prompts=False)
    assert alone.row_tokens == 4 * 42
    cost = RowCost(quadratic=0.5, masked=False)
    # 3 * 3 / 2 pairs within the prompt, 3 * 6 to it, (2 * 2 + 4 * 4) / 2 within completions.
    assert cost(RowShape(3, (2, 4))) == 9 + 0.5 * (4.5 + 18 + 10)
    # 2 * 2 pairs to what the first branch continues, 4 * 4 to what the second does.
    tree = RowShape(3, (2, 4), (Join(None, 2), Join(0, 4)))
    assert cost(tree) == 9 + 0.5 * (4.5 + 20 + 10)


def test_advantages_belong_to_their_completions() -> None:
    """Shuffling a group shuffles its advantages; groups never mix."""
    rewards, lengths = [1.0, 0.0, None, 0.25, 0.0], [3, 4, 5, 6, 7]
    other = scored_group("other", [5.0, 3.0], [2, 2])

    def by_length(order: list[int]) -> dict[int, float]:
        group = scored_group("g", [rewards[i] for i in order], [lengths[i] for i in order])
        found = plan([other, group], ranks=2)
        return {
            segment.tokens: segment.advantage
            for shard in found.updates[0]
            for batch in shard
            for row in batch.rows
            if row.group_id == "g"
            for segment in row.segments
        }

    base = by_length([0, 1, 2, 3, 4])
    assert sorted(base) == [3, 4, 6, 7]
    assert max(base, key=lambda n: base[n]) == 3
    assert by_length([4, 2, 0, 3, 1]) == pytest.approx(base)


def test_zero_variance_groups() -> None:
    groups = [scored_group("a", [0.1] * 8, [4] * 8), scored_group("b", [0.0, 1.0], [3, 3])]
    dropped = plan(groups)
    assert (dropped.trained, dropped.filtered, dropped.trained_tokens) == (2, 8, 6)
    kept = plan(groups, algorithm=AlgorithmConfig(drop_zero_variance=False))
    # Kept, they have no gradient but count in the mean.
    assert (kept.trained, kept.filtered, kept.trained_tokens) == (10, 0, 38)


def test_nothing_to_train_on() -> None:
    found = plan([scored_group("a", [0.0, 0.0], [3, 3]), scored_group("b", [None, 1.0], [3, 3])])
    assert found.micro_batches == 0
    assert (found.trained, found.filtered, found.failed) == (0, 2, 2)


def test_scores_of_another_group_are_refused() -> None:
    meta, _ = metas(scored_group("a", [0.0, 1.0], [3, 3]))
    _, scores = metas(scored_group("b", [0.0, 1.0], [3, 3]))
    with pytest.raises(ValueError, match="scores of b"):
        plan_step([(meta, scores)], AlgorithmConfig(), Packer(1, 64), max_tokens=8)


def test_rank_without_rows_gets_empty_micro_batches() -> None:
    found = plan([scored_group("a", [0.0, 1.0], [3, 3], prompt_tokens=30)], ranks=3)
    assert [len(shard) for shard in found.updates[0]] == [1, 1, 1]
    assert sum(bool(shard[0].rows) for shard in found.updates[0]) == 1
    empty = build_micro_batch(MicroBatch((), 1), {})
    assert empty.weight_T.tolist() == [0.0]


def test_tensors_against_brute_force() -> None:
    """Who sees whom, positions and targets, one token at a time."""
    groups = [
        scored_group("a", [0.0, 1.0, 2.0], [3, 1, 4], prompt_tokens=5),
        scored_group("b", [0.0, 1.0], [2, 2], prompt_tokens=1),
    ]
    found = plan(groups, micro_batch_tokens=500)
    (batch,) = found.updates[0][0]
    by_id = {g.group.id: g for g in groups}
    tensors = build_micro_batch(batch, by_id)
    seen = start = 0
    for row, shape in zip(batch.rows, tensors.tree.rows, strict=True):
        group = by_id[row.group_id].group
        owners: list[object] = ["prompt"] * row.prompt_tokens
        tokens = list(group.prompt.token_ids)
        positions = list(range(row.prompt_tokens))
        completions = {c.id: c for c in group.completions}
        for segment in row.segments:
            ids = completions[segment.completion_id].token_ids
            owners += [segment.completion_id] * segment.tokens
            tokens += ids.tolist()
            positions += range(row.prompt_tokens, row.prompt_tokens + segment.tokens)
        assert tensors.input_ids_N[start : start + row.length].tolist() == tokens
        assert tensors.position_ids_N[start : start + row.length].tolist() == positions
        assert shape.length == row.length
        padded = row.length + 3
        owners += [f"padding {i}" for i in range(3)]
        mask = Tree((shape,)).mask(padded, torch.device("cpu"))
        for q in range(padded):
            for k in range(padded):
                sees = k <= q and owners[k] in ("prompt", owners[q])
                sees = sees if not str(owners[q]).startswith("padding") else k == q
                assert bool(mask[0, 0, q, k]) == sees, (row, q, k)
        for segment in row.segments:
            completion = completions[segment.completion_id]
            for t in range(segment.tokens):
                at = owners.index(segment.completion_id) + t
                before = at - 1 if t else row.prompt_tokens - 1
                assert int(tensors.predict_T[seen]) == start + before
                assert int(tensors.target_T[seen]) == completion.token_ids[t]
                assert tensors.behaviour_T[seen] == completion.logprobs[t]
                assert tensors.advantage_T[seen] == pytest.approx(segment.advantage)
                assert tensors.weight_T[seen] == pytest.approx(segment.weight)
                seen += 1
        start += row.length
    assert start == len(tensors.input_ids_N)
    assert seen == len(tensors.target_T) == found.trained_tokens


def test_end_of_sequence_is_trained_and_padding_is_not() -> None:
    """Token 2 is both the end and the padding of these models: only lengths decide."""
    group = scored_group("a", [0.0, 1.0], [3, 6], truncated=(1,))
    found = plan([group], micro_batch_tokens=500, cost=RowCost(quadratic=10.0))
    (batch,) = found.updates[0][0]
    tensors = build_micro_batch(batch, {"a": group})
    assert len(tensors.target_T) == 9
    ends = [int(c.token_ids[-1]) for c in group.group.completions]
    assert ends[0] == 2
    assert tensors.target_T.tolist().count(2) == sum(
        c.token_ids.tolist().count(2) for c in group.group.completions
    )


def test_plan_and_group_must_agree() -> None:
    group = scored_group("a", [0.0, 1.0], [3, 3])
    (batch,) = plan([group]).updates[0][0]
    with pytest.raises(ValueError, match="was not sent"):
        build_micro_batch(batch, {})
    with pytest.raises(ValueError, match="4 tokens, 3 were planned"):
        build_micro_batch(batch, {"a": scored_group("a", [0.0, 1.0], [3, 4])})


def test_work_is_level_over_ranks() -> None:
    generator = random.Random(0)
    groups = [
        scored_group(str(i), [0.0, 1.0, 0.0, 1.0], [generator.randint(1, 60) for _ in range(4)])
        for i in range(16)
    ]
    found = plan(groups, ranks=2, micro_batch_tokens=256)
    cost = RowCost()
    work = [
        sum(cost(row.shape) for batch in shard for row in batch.rows) for shard in found.updates[0]
    ]
    assert max(work) / min(work) < 1.1


@pytest.mark.parametrize("masked", [True, False])
def test_shapes_come_back(masked: bool) -> None:
    """Rows of many different lengths are computed in few shapes."""
    sizes = set()
    for tokens in range(1, 90):
        groups = [
            scored_group("a", [0.0, 1.0], [tokens, 1], prompt_tokens=7),
            scored_group("b", [0.0, 1.0], [1, 1], prompt_tokens=7),
        ]
        cost = RowCost(masked=masked)
        [batch] = plan(groups, micro_batch_tokens=1000, cost=cost).updates[0][0]
        longest, other = 7 + tokens + 1, 9
        needed = 2 * longest if masked else longest + other
        assert needed <= batch.padded_tokens < needed + (64 if masked else 32)
        sizes.add(batch.padded_tokens)
    assert sizes == ({64, 128, 192, 256} if masked else {32, 64, 96, 128})


def segments_of(found: StepPlan, update: int = 0) -> dict[str, Segment]:
    return {
        segment.completion_id: segment
        for shard in found.updates[update]
        for batch in shard
        for segment in batch.segments
    }


def test_cut_completions_are_judged_but_not_trained() -> None:
    group = scored_group("a", [0.0, 1.0, 1.0], [8, 3, 2], truncated=(0,))
    found = plan([group], algorithm=AlgorithmConfig(mask_truncated=True))
    segments = segments_of(found)
    assert set(segments) == {"a/1", "a/2"}
    # The zero of the cut one is in the group's mean; its tokens are in no denominator.
    assert segments["a/1"].advantage == pytest.approx(0.5**0.5)
    assert segments["a/1"].weight == pytest.approx(1 / 5)
    assert (found.trained, found.filtered, found.failed) == (2, 1, 0)
    everything = scored_group("b", [0.0, 1.0], [8, 8], truncated=(0, 1))
    for drop in (True, False):
        algorithm = AlgorithmConfig(mask_truncated=True, drop_zero_variance=drop)
        found = plan([everything], algorithm=algorithm)
        assert (found.micro_batches, found.filtered, found.groups_filtered) == (0, 2, 1)


def test_a_length_penalty_is_no_signal() -> None:
    """All wrong, one completion a little into the buffer: nothing to learn for a task."""
    group = scored_group("a", [0.0] * 8, [27, 20, 3, 9, 9, 9, 9, 9])
    dapo = AlgorithmConfig(preset="dapo")
    found = plan([group], algorithm=dapo)
    assert (found.trained, found.filtered, found.groups_filtered) == (0, 8, 1)
    assert not informative(*metas(group), dapo)
    # The formula, where such groups are trained all the same.
    kept = dapo.model_copy(update={"drop_zero_variance": False})
    segments = segments_of(plan([group], algorithm=kept))
    assert segments["a/0"].advantage == pytest.approx(-(7**0.5))
    assert segments["a/1"].advantage == pytest.approx(1 / 7**0.5)


def test_a_length_penalty_shapes_groups_that_have_a_signal() -> None:
    group = scored_group("a", [1.0, 0.0, 0.0], [32, 4, 4])
    dapo = AlgorithmConfig(preset="dapo")
    # 1 - 1, 0, 0: the task tells them apart, so they are trained, on what is left of it.
    found = plan([group], algorithm=dapo)
    assert (found.trained, found.filtered) == (3, 0)
    assert {segment.advantage for segment in segments_of(found).values()} == {0.0}
    half = scored_group("a", [1.0, 0.0, 0.0], [29, 4, 4])
    segments = segments_of(plan([half], algorithm=dapo))
    assert segments["a/0"].advantage == pytest.approx(2**0.5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_kl_in_the_reward_is_no_signal(scale: Any, baseline: Any) -> None:
    groups = [
        scored_group("a", [1.0, 1.0], [3, 4]),
        scored_group("b", [0.0, 1.0], [3, 4]),
    ]
    kl = {"a/0": 0.02, "a/1": 0.03, "b/0": 0.5, "b/1": -0.5}
    algorithm = AlgorithmConfig(
        kl_coef=0.01, kl_in="reward", kl_estimator="k1", scale=scale, baseline=baseline
    )
    found = plan(groups, algorithm=algorithm, kl=kl)
    assert (found.trained, found.filtered) == (2, 2)
    # It is in the rewards of the groups that are trained: -0.005 and 1.005.
    raw = {"mean": 0.505, "leave_one_out": 1.01}[baseline]
    expected = raw / (1 if scale == "none" else 0.505)
    assert segments_of(found)["b/1"].advantage == pytest.approx(expected)
    # Groups without a difference in the task, kept: the KL's own size, never -1 and +1.
    kept = algorithm.model_copy(update={"drop_zero_variance": False})
    segments = segments_of(plan(groups, algorithm=kept, kl=kl))
    assert set(segments) == {"a/0", "a/1", "b/0", "b/1"}
    assert 0 < segments["a/0"].advantage < 1e-3
    assert segments["a/1"].advantage == pytest.approx(-segments["a/0"].advantage)


def test_a_completion_whose_kl_is_not_a_number_is_left_out() -> None:
    group = scored_group("a", [0.0, 1.0, 0.5], [3, 4, 5])
    algorithm = AlgorithmConfig(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    kl = {"a/0": 0.0, "a/1": 0.0, "a/2": float("nan")}
    found = plan([group], algorithm=algorithm, kl=kl)
    assert (found.trained, found.filtered, found.failed) == (2, 0, 1)
    assert segments_of(found)["a/1"].advantage == 1


@pytest.mark.parametrize("noise", [1e-9, 1e-7, 0.1 + 0.2 - 0.3])
def test_rewards_that_differ_by_rounding_are_equal(noise: float) -> None:
    flat = scored_group("a", [0.3, 0.3 + noise, 0.3], [3, 3, 3])
    assert plan([flat]).groups_filtered == 1
    assert zero_variance(*metas(flat))
    kept = plan([flat], algorithm=AlgorithmConfig(drop_zero_variance=False))
    assert {segment.advantage for segment in segments_of(kept).values()} == {0.0}
    small = scored_group("a", [0.3, 0.3 + 1e-4, 0.3], [3, 3, 3])
    assert plan([small]).groups_trained == 1
    assert not zero_variance(*metas(small))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("overlong", [0.0, 0.5])
def test_filter_plan_and_metric_agree(seed: int, overlong: float) -> None:
    """What dynamic sampling replaces is what the plan leaves out and what the metric counts."""
    groups = random_groups(seed, count=12)
    algorithm = AlgorithmConfig(overlong_buffer=overlong)
    found = plan(groups, algorithm=algorithm)
    assert found.groups_trained == sum(informative(*metas(g), algorithm) for g in groups)
    assert found.groups_filtered == sum(zero_variance(*metas(g)) for g in groups)


@pytest.mark.parametrize("preset", ["dr_grpo", "rloo"])
def test_a_constant_is_over_all_completions(preset: Any) -> None:
    """One group of eight with a signal: its tokens weigh what they would among seven others."""
    algorithm = AlgorithmConfig(preset=preset)
    eight = [scored_group(str(i), [0.0, 1.0, 1.0], [3, 4, 5]) for i in range(8)]
    one = [eight[0], *(scored_group(str(i), [1.0] * 3, [3, 4, 5]) for i in range(1, 8))]
    for groups in (eight, one):
        found = plan(groups, algorithm=algorithm)
        for segment in segments_of(found).values():
            assert segment.weight == pytest.approx(1 / (8 * 3 * 32))
    assert found.groups_trained == 1
    # The same gradient as with nothing left out.
    everything = plan(one, algorithm=algorithm.model_copy(update={"drop_zero_variance": False}))
    assert found.groups_trained < everything.groups_trained
    for name, segment in segments_of(everything).items():
        assert segment.advantage == 0 or segment == segments_of(found)[name]


def test_a_constant_counts_cut_completions_and_not_those_without_a_reward() -> None:
    groups = [
        scored_group("a", [0.0, 1.0, None, 1.0], [3, 4, 5, 9], truncated=(3,)),
        scored_group("b", [None, 1.0], [3, 4]),  # alone with its reward: as if never drawn
        scored_group("c", [0.5, 0.5], [3, 4]),
    ]
    algorithm = AlgorithmConfig(preset="dr_grpo", mask_truncated=True)
    found = plan(groups, algorithm=algorithm)
    assert (found.trained, found.filtered, found.failed) == (2, 3, 3)
    assert {segment.weight for segment in segments_of(found).values()} == {1 / (5 * 32)}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("signal", [range(8), [5], [0, 3, 4], []])
def test_a_constant_over_shares_ranks_and_rows(ranks: int, signal: Any) -> None:
    """Each update stands for its share of all groups, however few of them are trained."""
    groups = [scored_group(str(i), [1.0, float(i not in signal)], [3, 4]) for i in range(8)]
    options: dict[str, Any] = dict(ranks=ranks, micro_batch_tokens=16)
    share = AlgorithmConfig(preset="dr_grpo", updates_per_step=2, update_on="share")
    found = plan(groups, algorithm=share, **options)
    assert len(found.updates) == min(2, len(signal))
    for update in range(len(found.updates)):
        weights = {segment.weight for segment in segments_of(found, update).values()}
        assert weights == {1 / (4 * 2 * 32)}
    everything = AlgorithmConfig(preset="dr_grpo", updates_per_step=3)
    found = plan(groups, algorithm=everything, **options)
    for update in range(len(found.updates)):
        weights = {segment.weight for segment in segments_of(found, update).values()}
        assert weights <= {1 / (8 * 2 * 32)}


def test_batch_scale_is_of_the_groups_that_are_kept() -> None:
    groups = [
        scored_group("a", [0.0, 1.0], [3, 3]),
        scored_group("b", [0.0, 3.0, None], [3, 3, 3]),
        scored_group("c", [9.0, 9.0], [3, 3]),
    ]
    segments = segments_of(plan(groups, algorithm=AlgorithmConfig(scale="batch")))
    std = 1.5**0.5  # of 0, 1, 0, 3
    assert segments["a/1"].advantage == pytest.approx(0.5 / std)
    assert segments["b/1"].advantage == pytest.approx(1.5 / std)


def test_updates_see_all_groups_or_their_share() -> None:
    groups = [scored_group(name, [0.0, 1.0], [3, 4]) for name in "abc"]
    whole = plan(groups, algorithm=AlgorithmConfig(updates_per_step=2))
    assert whole.updates[0] == whole.updates[1]
    assert (whole.trained, whole.trained_tokens) == (6, 42)
    assert whole.micro_batches == 2 * len(whole.updates[0][0])
    shared = plan(groups, algorithm=AlgorithmConfig(updates_per_step=2, update_on="share"))
    assert set(segments_of(shared, 0)) == {"a/0", "a/1", "c/0", "c/1"}
    assert set(segments_of(shared, 1)) == {"b/0", "b/1"}
    # Every update's loss has its own denominator.
    assert segments_of(shared, 1)["b/0"].weight == pytest.approx(1 / 7)
    assert (shared.trained, shared.trained_tokens) == (6, 21)
    few = plan(groups, algorithm=AlgorithmConfig(updates_per_step=9, update_on="share"))
    assert len(few.updates) == 3


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0.0, 1.0], True), ([0.1, 0.1], False), ([None, 1.0], False), ([None, 0.0, 1.0], True)],
)
def test_informative_groups(rewards: list[float | None], expected: bool) -> None:
    meta, scores = metas(scored_group("a", rewards, [3] * len(rewards)))
    assert informative(meta, scores, AlgorithmConfig()) == expected


def test_scoring_covers_every_completion_once() -> None:
    groups = random_groups(3)
    shards = score_batches([metas(g)[0] for g in groups], Packer(ranks=2, micro_batch_tokens=200))
    ids = [p.completion_id for s in shards for b in s for row in b.rows for p in row.segments]
    sized = [c.id for g in groups for c in g.group.completions if len(c.token_ids)]
    assert sorted(ids) == sorted(sized)
