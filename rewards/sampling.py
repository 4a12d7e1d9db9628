"""Which rows a step gets: a row's place in the endless training sequence, and prompts that fit."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cohort.actors.records import Prompt, derive_seed
from cohort.rewards.rates import NO_RATES, PassRates
from cohort.rewards.rendering import PromptRenderer
from cohort.rewards.task import Curriculum, Row, Task, TaskError


@lru_cache(maxsize=64)
def row_order(seed: int, epoch: int, size: int) -> Sequence[int]:
    """The numbers 0 to size - 1 in the order of an epoch; a pure function of its arguments."""
    order = array("q", range(size))  # 8 bytes a row
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def sample_rows(
    task: Task, seed: int, cursor: int, count: int, rates: PassRates = NO_RATES
) -> list[tuple[int, Row]]:
    """Rows `cursor` to `cursor + count - 1` of the endless training sequence, with their epochs.

    A pure function of (seed, cursor), and of the pass rates when the task is a Curriculum. Other
    tasks get epochs that hold every row once, each epoch in an order of its own.

    Args:
        task: Where the rows are from.
        seed: The run's.
        cursor: The first position, from 0.
        count: How many rows.
        rates: For a Curriculum.

    Returns:
        (epoch, row) of each position; epochs count from 0.

    Raises:
        TaskError: The task has no training rows.
    """
    size = task.train_size()
    if size < 1:
        raise TaskError(f"{type(task).__name__} has no training rows")
    if isinstance(task, Curriculum):
        return [task.choose(seed, position, rates) for position in range(cursor, cursor + count)]
    rows = []
    for position in range(cursor, cursor + count):
        epoch, offset = divmod(position, size)
        rows.append((epoch, task.train_row(row_order(seed, epoch, size)[offset])))
    return rows


def split_overlong(
    prompts: Sequence[Prompt], limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Part prompts by length.

    Args:
        prompts: Rendered prompts.
        limit: Tokens; None: no limit.

    Returns:
        Prompts of at most `limit` tokens, and longer ones, each in the given order.
    """
    if limit is None:
        return list(prompts), []
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    overlong = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    return fitting, overlong


@dataclass(frozen=True)
class SampledPrompts:
    """Prompts for a step.

    Attributes:
        prompts: Those that fit.
        overlong: Those left out because they are too long.
        cursor: The position after both.
    """

    prompts: tuple[Prompt, ...]
    overlong: tuple[Prompt, ...]
    cursor: int


def sample_prompts(
    task: Task,
    renderer: PromptRenderer,
    seed: int,
    cursor: int,
    count: int,
    rates: PassRates = NO_RATES,
) -> SampledPrompts:
    """The next training prompts that are not too long.

    A pure function of (seed, cursor, rates), so that a resumed run gets the same ones.

    Args:
        task: Where the rows are from.
        renderer: Makes prompts of them.
        seed: The run's.
        cursor: The first position, from 0.
        count: How many prompts.
        rates: For a Curriculum.

    Raises:
        TaskError: A whole epoch's worth of rows without a prompt that fits, a prompt that is too
            long where the renderer says that this is an error, or two rows of an epoch with one id.
    """
    prompts: list[Prompt] = []
    overlong: list[Prompt] = []
    seen: set[str] = set()
    since_last = 0
    while len(prompts) < count:
        ((epoch, row),) = sample_rows(task, seed, cursor, 1, rates)
        prompt = renderer.render(row, epoch, cursor)
        cursor += 1
        if prompt.id in seen:
            raise TaskError(
                f"two rows of an epoch have the id {row.id}: a row's id must be its own "
                f"({type(task).__name__}.train_row)"
            )
        seen.add(prompt.id)
        fitting, too_long = split_overlong([prompt], renderer.max_prompt_tokens)
        if too_long and renderer.on_overlong == "error":
            raise TaskError(
                f"the prompt {prompt.id} has {len(prompt.token_ids)} tokens, more than the "
                f"{renderer.max_prompt_tokens} that this run has room for beside a completion: set "
                "model.max_length to the sum of both, or task.overlong=drop"
            )
        prompts += fitting
        overlong += too_long
        since_last = 0 if fitting else since_last + 1
        if since_last >= task.train_size():
            shortest = min(len(item.token_ids) for item in overlong)
            raise TaskError(
                f"all {task.train_size()} prompts are longer than {renderer.max_prompt_tokens} "
                f"tokens (the shortest has {shortest}): raise model.max_length or lower "
                "actors.max_tokens"
            )
    return SampledPrompts(tuple(prompts), tuple(overlong), cursor)
