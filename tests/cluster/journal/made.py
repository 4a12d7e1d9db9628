"""Groups with everything that a record can hold, and records of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from cohort.actors.records import (
    Completion,
    Failure,
    Group,
    GroupMeta,
    Prompt,
    RewardError,
    ScoredGroup,
    ScoreMeta,
)
from cohort.actors.turns import EpisodeEnd, Turn, TurnShape
from cohort.cluster.journal.records import GroupRecord, StepRecord


def group_record(
    step: int, name: str, seed: int = 0, *, cause: str = "", **columns: Any
) -> GroupRecord:
    """An episode of two turns and one completion without an environment."""
    dice = np.random.default_rng([step, seed, len(name)])
    prompt = Prompt(name, (5, 6, 7), [{"role": "user", "content": "half \ud800"}], columns, 0, "x")

    def made(number: int, sampled: int, **more: Any) -> Completion:
        return Completion(
            f"{step}:{name}/{number}",
            name,
            dice.integers(0, 2**31, sampled),
            dice.normal(size=sampled).astype(np.float32),
            "stop",
            2**47 + number,
            (step, step + 1),
            "text",
            **more,
        )

    turns = tuple(
        Turn(TurnShape(parent, 3, 2, 4), np.arange(2), (step, step), "stop", 0.1)
        for parent in (None, 0)
    )
    end = EpisodeEnd("done", (0.1, None), ({"role": "tool"},), {"n": 1.0}, {"board": (1, {2: 3})})
    group = Group(f"{step}:{name}", prompt, (made(0, 8, turns=turns, end=end), made(1, 3)))
    why: Any = cause
    errors = (RewardError("f", "c", why, "why"),) if cause else ()
    totals = (0.1 + 0.2, None)
    scored = ScoredGroup(
        group, {"f": totals}, totals, errors, 0.5, {}, {"f/x": ("a", None)}, (1.0,)
    )
    meta = GroupMeta.of(group, "rollout-0", 1.5)
    return GroupRecord(
        step, seed, meta, ScoreMeta(group.id, totals, {"f": totals}, errors, 0.5), scored
    )


def failure(name: str) -> tuple[str, Failure]:
    return name, Failure("data", f"group {name}", "out of range")


def a_history(seed: int, steps: int = 4) -> list[GroupRecord | StepRecord]:
    """Groups of overlapping steps in a random order; step records refer to none of them."""
    dice = random.Random(seed)
    records: list[GroupRecord | StepRecord] = []
    for step in range(steps):
        records += [group_record(step, f"0-{step}{i}", dice.randrange(99)) for i in range(2)]
    dice.shuffle(records)
    return records


def same(one: Any, other: Any) -> bool:
    """Equality of records, whose arrays must have the same bits."""
    if isinstance(one, np.ndarray):
        return bool(
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if type(one) is not type(other):
        return False
    if hasattr(one, "__dataclass_fields__"):
        return all(same(vars(one)[name], vars(other)[name]) for name in one.__dataclass_fields__)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)
