"""Episodes in rows that share what their turns have in common, against every turn by itself."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from cohort.actors.records import ScoredGroup
from cohort.actors.turns import TurnShape
from cohort.learner.batch import build_micro_batch
from cohort.learner.episodes import lay_out
from cohort.learner.logprobs import PolicyModel
from cohort.learner.packing import MicroBatch, Packer, RowCost
from cohort.learner.plan import score_batches
from cohort.learner.self_check import self_check
from cohort.learner.shapes import Join
from tests.learner.episodes import (
    CHAIN,
    FORKS,
    PROMPT,
    SHAPES,
    episode_group,
    episode_logprobs,
    random_shapes,
    sequence,
)
from tests.learner.helpers import metas, reference_logprobs, scored_group, tiny_model

TEMPERATURE = 0.7
ALL_IN_ONE = RowCost(quadratic=0.0)


def batches(groups: list[ScoredGroup], **options: Any) -> list[MicroBatch]:
    packer = Packer(**{"ranks": 1, "micro_batch_tokens": 10_000, **options})
    shards = score_batches([metas(group)[0] for group in groups], packer)
    return [batch for shard in shards for batch in shard]


def mixed() -> list[ScoredGroup]:
    """Two groups of episodes and one of completions, as a step of several tasks would have."""
    return [
        episode_group("a", SHAPES, [1.0, 0.0, 0.5, 0.2]),
        episode_group("bb", [FORKS, ()], [1.0, 0.0]),
        scored_group("c", [1.0, 0.0], [3, 9], prompt_tokens=PROMPT),
    ]


def expected_logprobs(model: Any, groups: list[ScoredGroup]) -> dict[str, torch.Tensor]:
    found = {}
    for group in groups:
        prompt = group.group.prompt.token_ids
        for c in group.group.completions:
            if c.turns:
                found[c.id] = episode_logprobs(model, prompt, c, TEMPERATURE)
            elif len(c.token_ids):
                found[c.id] = reference_logprobs(model, prompt, c.token_ids, TEMPERATURE)
    return found


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize(
    ("attention", "masked", "block", "shared"),
    [
        ("tree", 0, 512, True),
        ("tree", 0, 3, True),
        ("tree", 256, 512, True),
        ("eager", 0, 512, True),
        ("sdpa", 0, 512, True),
        ("tree", 0, 512, False),
        ("sdpa", 0, 512, False),
    ],
)
def test_every_sampled_token_is_scored_and_trained_as_in_its_own_sequence(
    kind: str, attention: Any, masked: int, block: int, shared: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cohort.learner.attention.MASKED_ROW_LENGTH", masked)
    monkeypatch.setattr("cohort.learner.attention.CAUSAL_BLOCK", block)
    model, groups = tiny_model(kind), mixed()
    policy = PolicyModel(model, attention)
    [batch] = batches(groups, cost=ALL_IN_ONE, share_prompts=shared)
    assert (len(batch.rows) == 3) == shared
    tensors = build_micro_batch(batch, {group.group.id: group for group in groups})
    logprobs, _ = policy(tensors, TEMPERATURE, 2)
    slopes = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    (logprobs * slopes).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    model.set_attn_implementation("eager")
    by_id = expected_logprobs(model, groups)
    if shared:
        expected = torch.cat([by_id[segment.completion_id] for segment in batch.segments])
    else:
        expected = torch.cat(
            [of_segment(segment, by_id[segment.completion_id]) for segment in batch.segments]
        )
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    (expected * slopes).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-5, msg=name)


def of_segment(segment: Any, values: torch.Tensor) -> torch.Tensor:
    """The part of an episode's values that belongs to the one branch of a segment."""
    if segment.branch is None:
        return values
    parts = values.split([turn.sampled for turn in segment.turns])
    return torch.cat([parts[place.turn] for place in segment.layout(PROMPT).places])


def test_a_model_that_cannot_share_reads_one_sequence_a_row() -> None:
    model, groups = tiny_model("mamba"), mixed()
    policy = PolicyModel(model)
    self_check(policy, TEMPERATURE)
    [batch] = batches(groups, share_prompts=policy.shares_prompts)
    tensors = build_micro_batch(batch, {group.group.id: group for group in groups})
    logprobs, _ = policy(tensors, TEMPERATURE)
    by_id = expected_logprobs(model, groups)
    expected = [of_segment(segment, by_id[segment.completion_id]) for segment in batch.segments]
    torch.testing.assert_close(logprobs, torch.cat(expected), atol=1e-5, rtol=1e-5)
    # A completion's tokens are one sequence, though they lie in several rows.
    names = [s.completion_id for s in batch.segments for _ in range(s.tokens)]
    pairs = set(zip(names, tensors.sequence_T.tolist(), strict=True))
    assert len(pairs) == len(set(names)) == len(set(tensors.sequence_T.tolist()))


def test_turns_that_extend_each_other_are_one_branch() -> None:
    layout = lay_out(CHAIN, PROMPT)
    assert (layout.branches, layout.joins) == ((11,), (Join(None, 6),))
    layout = lay_out(FORKS, PROMPT)
    # Ten branches instead of thirteen turns; every token once.
    assert sum(layout.branches) == sum(turn.inserted + turn.sampled for turn in FORKS)
    assert layout.joins[:4] == (Join(None, 6), Join(0, 8), Join(1, 12), Join(1, 9))
    [row] = batches([episode_group("a", [CHAIN, CHAIN], [0.0, 1.0])], cost=ALL_IN_ONE)[0].rows
    # Without a fork it is a prompt and completions, as any other row.
    assert (row.shape.prompt, row.shape.branches, row.shape.joins) == (6, (11, 11), ())


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_conserves_tokens_and_every_token_sees_its_own_sequence(seed: int) -> None:
    generator = random.Random(seed)
    groups = []
    for name in ("a", "bb", "ccc"):
        prompt = generator.choice([1, 5, 30])
        shapes = [random_shapes(generator, prompt) for _ in range(generator.randint(1, 5))]
        groups.append(episode_group(name, shapes, [0.0] * len(shapes), prompt))
    by_id = {group.group.id: group for group in groups}
    budget, shared = generator.choice([16, 60, 200, 5000]), seed % 3 > 0
    cost = RowCost(masked=seed % 2 == 0)
    options = {
        "ranks": seed % 2 + 1,
        "micro_batch_tokens": budget,
        "cost": cost,
        "whole_completions": seed % 5 > 0,
    }
    sampled: dict[str, int] = {}
    for batch in batches(groups, share_prompts=shared, **options):
        if not batch.rows:
            continue
        tensors = build_micro_batch(batch, by_id)
        assert len(tensors.input_ids_N) == sum(row.length for row in batch.rows)
        one = len(batch.rows) == 1 or len({s.completion_id for s in batch.segments}) == 1
        assert batch.padded_tokens <= budget or one
        longest = tensors.tree.longest
        mask = tensors.tree.mask(longest, torch.device("cpu"))[:, 0]
        places = tensors.tree.places(longest, torch.device("cpu"))
        ids, positions = torch.full((2, len(batch.rows) * longest), -1)
        ids[places], positions[places] = tensors.input_ids_N, tensors.position_ids_N
        seen = 0
        for row in batch.rows:
            group = by_id[row.group_id].group
            of_row = {completion.id: completion for completion in group.completions}
            if shared:
                stored = sum(t.inserted + t.sampled for s in row.segments for t in s.turns)
                assert row.length == len(group.prompt.token_ids) + stored
            for segment in row.segments:
                completion = of_row[segment.completion_id]
                for place in segment.layout(row.prompt_tokens).places:
                    whole = sequence(group.prompt.token_ids, completion, place.turn)
                    n = completion.turns[place.turn].shape.sampled
                    for t in range(len(whole) - n, len(whole)):
                        at = int(places[tensors.predict_T[seen]])
                        b, query = divmod(at, longest)
                        keys = mask[b, query].nonzero()[:, 0] + b * longest
                        order = positions[keys].argsort()
                        assert positions[keys][order].tolist() == list(range(t))
                        assert ids[keys][order].tolist() == whole[:t]
                        assert int(tensors.target_T[seen]) == whole[t]
                        seen += 1
                sampled[completion.id] = sampled.get(completion.id, 0) + segment.tokens
        assert seen == len(tensors.target_T)
    assert sampled == {
        c.id: len(c.token_ids) for g in groups for c in g.group.completions if len(c.token_ids)
    }


@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_a_completion_share_a_pass_only_where_the_loss_needs_it(whole: bool) -> None:
    group = episode_group("a", [FORKS, CHAIN], [0.0, 1.0])
    options = {"micro_batch_tokens": 32, "share_prompts": False, "whole_completions": whole}
    packed = batches([group], ranks=2, **options)
    rows = [len(batch.rows) for batch in packed if batch.rows]
    assert sum(rows) > 5
    passes = {name: 0 for name in ("a/0", "a/1")}
    for batch in packed:
        for name in {segment.completion_id for segment in batch.segments}:
            passes[name] += 1
    assert passes["a/1"] == 1
    assert (passes["a/0"] == 1) == whole
    # All on one rank, whose sum of the KL is the completion's.
    packer = Packer(ranks=2, **options)
    for shard in score_batches([metas(group)[0]], packer):
        assert len({s.completion_id for batch in shard for s in batch.segments}) == 1


def test_plan_and_episode_must_agree() -> None:
    group = episode_group("a", [CHAIN, CHAIN], [0.0, 1.0])
    [batch] = batches([group])
    longer = (*CHAIN[:2], TurnShape(1, 13, 2, 3))
    with pytest.raises(ValueError, match=r"turns .* were planned"):
        build_micro_batch(batch, {"a": episode_group("a", [CHAIN, longer], [0.0, 1.0])})
    first = group.group.completions[0]
    cut = replace(first.turns[1], inserted_ids=first.turns[1].inserted_ids[:1])
    broken = replace(first, turns=(first.turns[0], cut, first.turns[2]))
    changed = replace(group.group, completions=(broken, group.group.completions[1]))
    with pytest.raises(ValueError, match="turn 1 has 1 inserted tokens, its shape 2"):
        build_micro_batch(batch, {"a": replace(group, group=changed)})


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ((TurnShape(0, 6, 0, 1),), "not before it"),
        ((TurnShape(None, 7, 0, 1),), "keeps 7 of 6 tokens"),
        ((TurnShape(None, 6, 0, 2), TurnShape(0, 9, 0, 1)), "keeps 9 of 8 tokens"),
        ((TurnShape(None, 0, 0, 2),), "no tokens to sample after"),
    ],
)
def test_turns_that_cannot_be_are_refused(turns: tuple[TurnShape, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        lay_out(turns, PROMPT)
