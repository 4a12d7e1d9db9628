"""Which completions are shown: evenly spread steps and groups, and prompts that came again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cohort.cluster.observe.report.recorded import (
    LONGEST_TEXT,
    ReportedCompletion,
    Text,
    prompt_key,
    read_groups,
    read_rows,
    shorten,
    with_advantages,
)
from cohort.learner.config import AlgorithmConfig

STEP_FILE = re.compile(r"step-(\d{1,15})\.jsonl")

T = TypeVar("T")


@dataclass(frozen=True)
class ReportLimits:
    """How much of the completions is shown.

    Attributes:
        steps: Steps.
        groups: Groups of each.
        prompts: Prompts that came at several steps; 0 reads only the files of the steps shown.
        visits: Steps of each such prompt.
    """

    steps: int = 40
    groups: int = 4
    prompts: int = 6
    visits: int = 8


@dataclass(frozen=True)
class Message:
    """A part of a prompt; a prompt that is plain text has one without a role."""

    role: str
    content: Text


@dataclass(frozen=True)
class ReportedGroup:
    """A group of one step; `prompt` is an index into `Completions.prompts`."""

    step: int
    prompt: int
    prompt_tokens: int
    functions: tuple[str, ...]
    completions: tuple[ReportedCompletion, ...]


@dataclass(frozen=True)
class StepView:
    """A step that is shown.

    Attributes:
        step: Counted from 0.
        groups: Indices into `Completions.groups`.
        of: How many groups the step has.
    """

    step: int
    groups: tuple[int, ...]
    of: int


@dataclass(frozen=True)
class Completions:
    """Each prompt and each group once.

    Attributes:
        prompts: Each as its messages.
        groups: Those of `steps` and of `recurring`.
        steps: In order.
        recurring: For each prompt that came again its groups, in order of steps.
        recorded: How many steps have a file.
        unread: Lines of the steps shown that could not be read.
    """

    prompts: tuple[tuple[Message, ...], ...] = ()
    groups: tuple[ReportedGroup, ...] = ()
    steps: tuple[StepView, ...] = ()
    recurring: tuple[tuple[int, ...], ...] = ()
    recorded: int = 0
    unread: int = 0


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread: the last one, and from two on the first one."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[len(items) - count :])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def choose_completions(
    folder: Path, limits: ReportLimits, algorithm: AlgorithmConfig | None, max_tokens: int | None
) -> Completions:
    """Read rollouts/ as far as needed. Advantages need the algorithm and actors.max_tokens."""
    files = _step_files(folder)
    visits = _recurring(files, limits) if limits.prompts else {}
    chosen = spread(list(files), limits.steps)
    again: dict[int, set[bytes]] = {}
    for key, steps in visits.items():
        for step in steps:
            again.setdefault(step, set()).add(key)

    prompts: dict[bytes, tuple[Message, ...]] = {}
    places: dict[bytes, int] = {}
    groups: list[ReportedGroup] = []
    views: list[StepView] = []
    met: dict[bytes, list[int]] = {key: [] for key in visits}
    unread = 0
    for step in sorted({*chosen, *again}):
        try:
            raw, damaged = read_groups(files[step])
        except FileNotFoundError:
            continue  # a resumed run removes the steps that it does again
        unread += damaged
        if algorithm is not None and max_tokens is not None:
            raw = with_advantages(raw, algorithm, max_tokens)
        wanted = set(spread(range(len(raw)), limits.groups)) if step in chosen else set()
        missing = set(again.get(step, ()))
        shown = []
        for place, group in enumerate(raw):
            recurs = group.key in missing
            if not recurs and place not in wanted:
                continue
            if group.key not in prompts:
                places[group.key] = len(prompts)
                prompts[group.key] = _messages(group.prompt)
            if recurs:
                missing.remove(group.key)
                met[group.key].append(len(groups))
            shown.append(len(groups))
            groups.append(
                ReportedGroup(
                    step, places[group.key], group.prompt_tokens, group.functions, group.completions
                )
            )
        if step in chosen:
            views.append(StepView(step, tuple(shown), len(raw)))
    return Completions(
        prompts=tuple(prompts.values()),
        groups=tuple(groups),
        steps=tuple(views),
        recurring=tuple(tuple(visited) for visited in met.values() if len(visited) > 1),
        recorded=len(files),
        unread=unread,
    )


def _step_files(folder: Path) -> dict[int, Path]:
    """The files of rollouts/ by step, in order; none when the folder is not there."""
    names = {file: STEP_FILE.fullmatch(file.name) for file in folder.glob("step-*.jsonl")}
    return dict(sorted((int(match[1]), file) for file, match in names.items() if match))


def _recurring(files: Mapping[int, Path], limits: ReportLimits) -> dict[bytes, list[int]]:
    """The prompts that came at most steps, and at which; the earliest first among equals."""
    visits: dict[bytes, list[int]] = {}
    for step, file in files.items():
        for key in _prompts_of(file):
            visits.setdefault(key, []).append(step)
    several = [key for key, steps in visits.items() if len(steps) > 1]
    several.sort(key=lambda key: -len(visits[key]))
    return {key: spread(visits[key], limits.visits) for key in several[: limits.prompts]}


def _prompts_of(file: Path) -> list[bytes]:
    """The prompts of a step, each once, in order."""
    keys: dict[str, bytes] = {}
    try:
        for row in read_rows(file):
            if row is not None and row.group_id not in keys:
                keys[row.group_id] = prompt_key(row.prompt)
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(keys.values()))


def _messages(prompt: object) -> tuple[Message, ...]:
    """A prompt as messages, whatever its form."""
    if isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in prompt
    ):
        return tuple(
            Message(str(message.get("role", "")), _text(message["content"])) for message in prompt
        )
    return (Message("", _text(prompt if isinstance(prompt, str) else json.dumps(prompt))),)


def _text(text: str) -> Text:
    return shorten(Text(text), LONGEST_TEXT)
