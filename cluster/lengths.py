"""Prompt lengths: which rows are rendered before the start, and what they tell about all rows.

Rendering takes about a millisecond a prompt. Of large data only the longest rows and some others
are rendered before the start; every other prompt is rendered, and its length checked, when it is
sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cohort.actors.records import Prompt
from cohort.cluster.config import Config
from cohort.rewards.progress import with_progress
from cohort.rewards.specs import RewardSpec
from cohort.rewards.survey import UNKNOWN, survey_of
from cohort.rewards.tasks import PromptRenderer, Row, Task, TaskError, split_overlong

# A task with at most so many rows and bytes of prompts is rendered whole.
WHOLE_ROWS = 10_000
WHOLE_BYTES = 32 << 20
# Of others, rows to render in each split: the first, the longest, and some spread over all.
FIRST = 16
LONGEST = 500
SPREAD = 500
LONGEST_BYTES = 4 << 20
# How much longer in tokens other rows may be than rendered rows of the same bytes, and where their
# bytes are not known.
MARGIN = 1.1
UNKNOWN_MARGIN = 1.25
# Room in a sequence for a message of an environment.
MESSAGE_TOKENS = 256


@dataclass(frozen=True)
class Rendered:
    """Prompts of a task, in the order of its rows.

    Attributes:
        train: Of the training split.
        held_out: Of the held-out split.
        rows: Of both splits, rendered or not.
        rest: Estimated tokens of the longest prompt that was not rendered; 0 for none.
        sources: Of all rows; None when not all are known.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    rows: int
    rest: int
    sources: frozenset[str] | None

    @property
    def prompts(self) -> list[Prompt]:
        return self.train + self.held_out

    @property
    def whole(self) -> bool:
        """Whether every row is among the prompts."""
        return len(self.train) + len(self.held_out) == self.rows


@dataclass(frozen=True)
class Lengths:
    """The lengths that a run is planned with, in tokens.

    Attributes:
        longest: Of the longest prompt that is used.
        max_length: Of a prompt with its completion.
        overlong: How many of the rendered prompts are left out.
    """

    longest: int
    max_length: int
    overlong: int


def render_rows(task: Task, renderer: PromptRenderer) -> Rendered:
    """Render every prompt of a task of usual size; the longest and some others of a larger one."""
    survey = survey_of(task)
    sizes = (survey.train_bytes, survey.eval_bytes)
    rows = sum(map(len, sizes))
    known = sum(int(size[size != UNKNOWN].sum()) for size in sizes)
    whole = rows <= WHOLE_ROWS and known <= WHOLE_BYTES
    splits, rest = [], 0
    row_of: Callable[[int], Row]
    for size, row_of, name in (
        (sizes[0], task.train_row, "training"),
        (sizes[1], task.eval_row, "held-out"),
    ):
        indexes = np.arange(len(size)) if whole else chosen(size)
        prompts = [
            renderer.render(row_of(int(index)), 0, int(index))
            for index in with_progress(indexes, f"rendering {name} prompts", len(indexes))
        ]
        rest = max(rest, _rest(size, indexes, prompts))
        splits.append(prompts)
    sources = survey.sources
    if whole and sources is None:
        found = (prompt.source for prompts in splits for prompt in prompts)
        sources = frozenset(source for source in found if source is not None)
    return Rendered(splits[0], splits[1], rows, rest, sources)


def chosen(sizes: np.ndarray) -> np.ndarray:
    """Indexes of the rows to render: the first, the longest, some spread over all.

    Args:
        sizes: Bytes of each row of a split, UNKNOWN where not known; shape (rows,).
    """
    longest = np.argsort(-sizes, kind="stable")[:LONGEST]
    longest = longest[np.cumsum(sizes[longest]) - sizes[longest] <= LONGEST_BYTES]
    # Rows of unknown size may be few among many others: in a mixture, those of one part.
    unknown = np.flatnonzero(sizes == UNKNOWN)
    spread = (evenly(np.arange(len(sizes)), SPREAD), evenly(unknown, SPREAD))
    return np.unique(np.concatenate([np.arange(min(FIRST, len(sizes))), longest, *spread]))


def evenly(items: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the items, spread evenly over them, in their order."""
    if len(items) <= most:
        return items
    return items[np.arange(most) * len(items) // most]


def _rest(sizes: np.ndarray, indexes: np.ndarray, prompts: Sequence[Prompt]) -> int:
    """Estimate the tokens of the longest prompt among the rows that were not rendered."""
    others = np.ones(len(sizes), dtype=bool)
    others[indexes] = False
    if not others.any():
        return 0
    tokens = np.array([len(prompt.token_ids) for prompt in prompts])
    if (sizes[others] == UNKNOWN).any():
        return math.ceil(UNKNOWN_MARGIN * tokens.max())
    largest = int(sizes[others].max())
    seen = sizes[indexes]
    # By rows of a similar size, because in small ones the chat template weighs more.
    alike = seen >= largest / 2
    return math.ceil(MARGIN * largest * (tokens[alike] / seen[alike]).max())


def check_lengths(
    config: Config, rendered: Rendered, renderer: PromptRenderer, specs: Sequence[RewardSpec]
) -> Lengths:
    """Decide the lengths that the run is planned with.

    Where not all rows were rendered, the renderer's bound is set to what the engines will have room
    for; longer prompts are found when they are sampled.

    Raises:
        TaskError: A prompt is too long and task.overlong=error, all are too long, or a reward
            function is for a source that no row has.
    """
    for spec in specs:
        unknown = sorted(set(spec.sources) - (rendered.sources or frozenset()))
        if unknown and rendered.sources is not None:
            raise TaskError(
                f"rewards.functions: {spec.path} is for the source {unknown[0]}, and the rows' "
                f"sources are {', '.join(sorted(rendered.sources)) or 'none'}"
            )
    prompts, room = rendered.prompts, config.actors.max_tokens
    fitting, overlong = split_overlong(prompts, renderer.max_prompt_tokens)
    if overlong and config.task.overlong == "error":
        worst = max(overlong, key=lambda prompt: len(prompt.token_ids))
        raise TaskError(
            f"{len(overlong)} of {len(prompts)} prompts are longer than "
            f"{renderer.max_prompt_tokens} tokens, which is what the context leaves beside "
            f"actors.max_tokens={room}; the longest, {worst.id}, has {len(worst.token_ids)}. Raise "
            "model.max_length, lower actors.max_tokens, or set task.overlong=drop"
        )
    if not fitting:
        raise TaskError(f"every prompt is longer than {renderer.max_prompt_tokens} tokens")
    longest = max(rendered.rest, *(len(prompt.token_ids) for prompt in fitting))
    if renderer.max_prompt_tokens is not None:
        longest = min(longest, renderer.max_prompt_tokens)
    max_length = config.model.max_length or longest + room
    if config.task.environment is not None and not config.model.max_length:
        # As much for what the environment says as for what the model does, and at least what a
        # message usually needs, if the context has it.
        max_length = longest + config.environments.max_turns * (room + max(room, MESSAGE_TOKENS))
        if renderer.max_prompt_tokens is not None:
            max_length = min(max_length, renderer.max_prompt_tokens + room)
    if not rendered.whole:
        renderer.max_prompt_tokens = max_length - room
    return Lengths(longest, max_length, len(overlong))
