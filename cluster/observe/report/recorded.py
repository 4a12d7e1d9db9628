"""Completions as rollouts/ keeps them: read line by line, shortened, with their advantages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.cluster.observe.rollouts import transcript
from cohort.learner.config import AlgorithmConfig
from cohort.learner.credit import assign_credit

# Longer texts lose their middle when they are read; the page may shorten them further.
LONGEST_TEXT = 100_000


@dataclass(frozen=True)
class Text:
    """A text, or its beginning and end; `left_out` characters between them are missing."""

    head: str
    left_out: int = 0
    tail: str = ""


def shorten(text: Text, limit: int) -> Text:
    """At most `limit` characters: two thirds of them from the beginning, the rest from the end."""
    length = len(text.head) + len(text.tail)
    if length <= limit:
        return text
    end = limit // 3
    tail = (text.tail or text.head)[-end:] if end else ""
    head = text.head[: limit - len(tail)]
    return Text(head, text.left_out + length - len(head) - len(tail), tail)


@dataclass(frozen=True)
class ReportedCompletion:
    """One completion.

    Attributes:
        text: What the model wrote.
        reward: The weighted total; None where a function failed.
        values: One of each function of its group; None where it does not apply or failed.
        errors: Of the functions that failed.
        tokens: Its length.
        truncated: Whether it was stopped at actors.max_tokens.
        versions: The weights of its first and of its last token.
        advantage: None when the completion is not trained, or when it is not known.
        untrained: Why it is not trained; empty when it is, or when that is not known.
    """

    text: Text
    reward: float | None
    values: tuple[float | None, ...]
    errors: tuple[Text, ...]
    tokens: int
    truncated: bool
    versions: tuple[int, ...]
    advantage: float | None = None
    untrained: str = ""


@dataclass(frozen=True)
class RecordedGroup:
    """A group as its rows describe it; `key` is equal for equal prompts."""

    key: bytes
    prompt: object
    prompt_tokens: int
    functions: tuple[str, ...]
    completions: tuple[ReportedCompletion, ...]


class RecordedError(BaseModel):
    """Why a function gave no value."""

    function: str
    cause: str
    message: str


class RecordedRow(BaseModel):
    """What the report reads of a row of rollouts/, see `rollouts.RolloutRow`."""

    model_config = ConfigDict(strict=True)

    group_id: str
    prompt: object
    completion: str
    reward: float | None
    by_function: dict[str, float | None]
    errors: list[RecordedError]
    tokens: NonNegativeInt
    prompt_tokens: NonNegativeInt
    finish_reason: str
    weight_versions: list[NonNegativeInt]


def prompt_key(prompt: object) -> bytes:
    """The same for the same question; the ids of prompts differ from epoch to epoch."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()


def read_rows(file: Path) -> Iterator[RecordedRow | None]:
    """The rows of a step, one at a time; None for a line that is damaged or not whole yet."""
    # In bytes: a completion may hold any of the characters that end a line in text.
    with file.open("rb") as lines:
        for line in lines:
            try:
                # Not validate_json: a text may hold half a surrogate pair.
                found = json.loads(line.decode("utf-8", "replace"))
                if found.get("episode"):
                    found["completion"] = transcript(found)
                yield RecordedRow.model_validate(found)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                yield None


def read_groups(file: Path) -> tuple[list[RecordedGroup], int]:
    """The groups of one step in order, and how many lines could not be read."""
    first_rows: dict[str, RecordedRow] = {}
    completions: dict[str, list[ReportedCompletion]] = {}
    unread = 0
    for row in read_rows(file):
        if row is None:
            unread += 1
            continue
        first = first_rows.setdefault(row.group_id, row)
        # Shortened one by one: a step may have gigabytes of completions.
        completions.setdefault(row.group_id, []).append(_completion(row, first.by_function))
    groups = [
        RecordedGroup(
            key=prompt_key(row.prompt),
            prompt=row.prompt,
            prompt_tokens=row.prompt_tokens,
            functions=tuple(row.by_function),
            completions=tuple(completions[group_id]),
        )
        for group_id, row in first_rows.items()
    ]
    return groups, unread


def _completion(row: RecordedRow, functions: Iterable[str]) -> ReportedCompletion:
    return ReportedCompletion(
        text=shorten(Text(row.completion), LONGEST_TEXT),
        reward=_finite(row.reward),
        values=tuple(_finite(row.by_function.get(name)) for name in functions),
        errors=tuple(
            shorten(Text(f"{e.function} {e.cause}: {e.message}"), LONGEST_TEXT) for e in row.errors
        ),
        tokens=row.tokens,
        truncated=row.finish_reason == "length",
        versions=tuple(row.weight_versions),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def with_advantages(
    groups: Sequence[RecordedGroup], algorithm: AlgorithmConfig, max_tokens: int
) -> list[RecordedGroup]:
    """All groups of one step with the advantages that the learner gives their completions.

    The learner's own functions decide. What they do not know here is a KL in the reward, which the
    learner takes off the reward of each completion: that needs the reference model. Where each turn
    has an advantage of its own, a completion has none.
    """
    if algorithm.credit == "turn":
        return list(groups)
    pairs = []
    for place, group in enumerate(groups):
        meta = GroupMeta(
            group_id=str(place),
            prompt_tokens=max(1, group.prompt_tokens),
            completion_ids=tuple(f"{place}/{i}" for i in range(len(group.completions))),
            completion_tokens=tuple(completion.tokens for completion in group.completions),
            truncated=tuple(completion.truncated for completion in group.completions),
            weight_versions=(0, 0),
            actor="",
            seconds=0.0,
        )
        totals = tuple(completion.reward for completion in group.completions)
        pairs.append((meta, ScoreMeta(str(place), totals, {}, (), 0.0)))
    trained = assign_credit(pairs, algorithm, max_tokens).advantages
    return [
        replace(
            group,
            completions=tuple(
                replace(completion, advantage=trained[f"{place}/{i}"])
                if f"{place}/{i}" in trained
                else replace(completion, untrained=_why_untrained(completion, group, algorithm))
                for i, completion in enumerate(group.completions)
            ),
        )
        for place, group in enumerate(groups)
    ]


def _why_untrained(
    one: ReportedCompletion, group: RecordedGroup, algorithm: AlgorithmConfig
) -> str:
    if one.reward is None:
        return "no reward"
    if one.tokens == 0:
        return "no tokens"
    if sum(s.reward is not None and s.tokens > 0 for s in group.completions) < 2:
        return "the only reward of its group"
    if algorithm.mask_truncated and one.truncated:
        return "truncated"
    return "group without signal"
