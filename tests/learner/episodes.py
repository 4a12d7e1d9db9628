"""Groups of episodes, and their turns as sequences of their own."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from cohort.actors.records import Completion, GroupMeta, ScoredGroup, ScoreMeta
from cohort.actors.turns import Turn, TurnShape
from tests.learner.helpers import VOCABULARY, metas, scored_group

Shapes = tuple[TurnShape, ...]
PROMPT = 6

CHAIN = (TurnShape(None, 6, 0, 3), TurnShape(0, 9, 2, 2), TurnShape(1, 13, 1, 3))
FORKS = (
    TurnShape(None, 6, 0, 5),
    TurnShape(0, 8, 2, 4),  # from the middle of sampled tokens
    TurnShape(1, 12, 1, 3),  # again, a level deeper
    TurnShape(2, 16, 2, 2),  # extends that
    TurnShape(1, 9, 3, 2),  # from the middle of inserted tokens
    TurnShape(0, 11, 0, 2),  # extends the first with nothing between
    TurnShape(0, 11, 0, 1),  # comes second to it
    TurnShape(3, 4, 2, 3),  # from the middle of the prompt
    TurnShape(7, 9, 1, 0),  # samples nothing
    TurnShape(8, 10, 1, 2),  # extends what samples nothing
    TurnShape(2, 6, 0, 2),  # the prompt alone, kept through another turn
    TurnShape(None, 0, 3, 2),  # keeps nothing
    TurnShape(6, 12, 0, 0),  # no tokens at all
)
SHAPES: list[Shapes] = [CHAIN, FORKS, (TurnShape(None, 6, 0, 4),), FORKS[:5]]


def episode_group(
    group_id: str, shapes: list[Shapes], rewards: list[float | None], prompt: int = PROMPT
) -> ScoredGroup:
    """Random episodes with these turns; no turns: an episode without tokens."""
    sampled = [sum(turn.sampled for turn in turns) for turns in shapes]
    group = scored_group(group_id, rewards, sampled, prompt)
    generator = np.random.default_rng(len(group_id))
    completions = []
    for completion, turns in zip(group.group.completions, shapes, strict=True):
        made = tuple(
            Turn(turn, generator.integers(0, VOCABULARY, turn.inserted), (0, 0), "stop")
            for turn in turns
        )
        completions.append(replace(completion, turns=made))
    return replace(group, group=replace(group.group, completions=tuple(completions)))


def episode_metas(
    group: ScoredGroup, turn_rewards: list[tuple[float, ...]]
) -> tuple[GroupMeta, ScoreMeta]:
    """What the driver knows when the environment gave these rewards for the turns.

    The totals of the group are those of the reward functions; the environment's come on top.
    """
    meta, scores = metas(group)
    own = tuple(sum(turns) for turns in turn_rewards)
    totals = tuple(
        None if total is None else total + more
        for total, more in zip(scores.totals, own, strict=True)
    )
    return meta, replace(
        scores,
        totals=totals,
        by_function={"environment": own, "correct": scores.totals},
        turn_rewards=tuple(turn_rewards),
    )


def random_shapes(generator: random.Random, prompt: int) -> Shapes:
    """Turns that continue any earlier turn, from any of its tokens."""
    turns: list[TurnShape] = []
    for index in range(generator.randint(1, 7)):
        parent = generator.choice([None, *range(index), *([index - 1] * index)])
        there = prompt if parent is None else turns[parent].end
        kept = generator.choice([there, there, generator.randint(1, there)])
        turns.append(
            TurnShape(parent, kept, generator.choice([0, 1, 4]), generator.choice([0, 1, 3, 9]))
        )
    return tuple(turns)


def sequence(prompt: tuple[int, ...], completion: Completion, turn: int) -> list[int]:
    """All tokens of a turn's sequence, one after another."""
    shape = completion.turns[turn].shape
    before = list(prompt) if shape.parent is None else sequence(prompt, completion, shape.parent)
    start = sum(t.shape.sampled for t in completion.turns[:turn])
    sampled = completion.token_ids[start : start + shape.sampled].tolist()
    return [*before[: shape.kept], *completion.turns[turn].inserted_ids.tolist(), *sampled]


def episode_logprobs(
    model: torch.nn.Module, prompt: tuple[int, ...], completion: Completion, temperature: float
) -> torch.Tensor:
    """[T] of every sampled token, each turn's whole sequence by itself through the model."""
    found = []
    for index, turn in enumerate(completion.turns):
        if turn.shape.sampled:
            tokens = torch.tensor(sequence(prompt, completion, index))
            logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
            logprobs = (logits / temperature).log_softmax(-1)
            first = len(tokens) - turn.shape.sampled
            found += [logprobs[t - 1, tokens[t]] for t in range(first, len(tokens))]
    return torch.stack(found)
