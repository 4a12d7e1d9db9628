"""Completions as rollouts/ keeps them: read line by line, shortened, with their advantages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cohort.actors.records import GroupMeta, ScoreMeta
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
class Sample:
    """One completion. values: one a function of its group, None where it does not apply or failed.

    versions: the weights of the first and of the last token. advantage: None when the completion
    is not trained, for the reason in `untrained`, or when it is not known (no reason).
    """

    text: Text
    reward: float | None
    values: tuple[float | None, ...]
    errors: tuple[Text, ...]
    tokens: int
    cut: bool
    versions: tuple[int, ...]
    advantage: float | None = None
    untrained: str = ""


@dataclass(frozen=True)
class RawGroup:
    """A group as its rows tell it. key: equal for equal prompts."""

    key: bytes
    prompt: Any
    prompt_tokens: int
    functions: tuple[str, ...]
    samples: tuple[Sample, ...]


def prompt_key(prompt: Any) -> bytes:
    """The same for the same question; the ids of prompts differ from epoch to epoch."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()


def read_rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a JSON lines file, one at a time; None for a line that is none (yet)."""
    # In bytes: a completion may hold any of the characters that end a line in text.
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def read_groups(file: Path) -> tuple[list[RawGroup], int]:
    """The groups of one step in order, and how many lines could not be read."""
    samples: dict[str, list[Sample]] = {}
    first_rows: dict[str, dict[str, Any]] = {}
    unread = 0
    for row in read_rows(file):
        try:
            if row is None:
                raise ValueError("no JSON object")
            first = first_rows.get(row["group_id"], row)
            sample = _sample(row, tuple(first["by_function"]))
            _prompt_tokens(row)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            unread += 1
            continue
        first_rows[row["group_id"]] = first
        samples.setdefault(row["group_id"], []).append(sample)
    groups = [
        RawGroup(
            key=prompt_key(row["prompt"]),
            prompt=row["prompt"],
            prompt_tokens=_prompt_tokens(row),
            functions=tuple(row["by_function"]),
            samples=tuple(samples[group_id]),
        )
        for group_id, row in first_rows.items()
    ]
    return groups, unread


def _sample(row: dict[str, Any], functions: tuple[str, ...]) -> Sample:
    completion, values = row["completion"], row["by_function"]
    if not isinstance(completion, str):
        raise TypeError("the completion is no text")
    return Sample(
        text=shorten(Text(completion), LONGEST_TEXT),
        reward=_reward(row["reward"]),
        values=tuple(_reward(values.get(name)) for name in functions),
        errors=tuple(
            shorten(Text(f"{e['function']} {e['cause']}: {e['message']}"), LONGEST_TEXT)
            for e in row["errors"]
        ),
        tokens=_count(row["tokens"]),
        cut=row["finish_reason"] == "length",
        versions=tuple(_count(version) for version in row["weight_versions"]),
    )


def _prompt_tokens(row: dict[str, Any]) -> int:
    return _count(row["prompt_tokens"])


def _reward(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def with_advantages(
    groups: Sequence[RawGroup], algorithm: AlgorithmConfig, max_tokens: int
) -> list[RawGroup]:
    """All groups of one step with the advantages that the learner gives their completions.

    The learner's own functions decide. What they do not know here is a KL in the reward, which the
    learner takes off the reward of each completion: that needs the reference model.
    """
    pairs = []
    for place, group in enumerate(groups):
        meta = GroupMeta(
            group_id=str(place),
            prompt_tokens=max(1, group.prompt_tokens),
            completion_ids=tuple(f"{place}/{i}" for i in range(len(group.samples))),
            completion_tokens=tuple(sample.tokens for sample in group.samples),
            truncated=tuple(sample.cut for sample in group.samples),
            weight_versions=(0, 0),
            actor="",
            seconds=0.0,
        )
        totals = tuple(sample.reward for sample in group.samples)
        pairs.append((meta, ScoreMeta(str(place), totals, {}, (), 0.0)))
    trained = assign_credit(pairs, algorithm, max_tokens).advantages
    return [
        replace(
            group,
            samples=tuple(
                replace(sample, advantage=trained[f"{place}/{i}"])
                if f"{place}/{i}" in trained
                else replace(sample, untrained=_why_untrained(sample, group, algorithm))
                for i, sample in enumerate(group.samples)
            ),
        )
        for place, group in enumerate(groups)
    ]


def _why_untrained(sample: Sample, group: RawGroup, algorithm: AlgorithmConfig) -> str:
    if sample.reward is None:
        return "no reward"
    if sample.tokens == 0:
        return "no tokens"
    if sum(s.reward is not None and s.tokens > 0 for s in group.samples) < 2:
        return "the only reward of its group"
    if algorithm.mask_truncated and sample.cut:
        return "truncated"
    return "group without signal"
