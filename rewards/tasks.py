"""Tasks: where prompts come from, which functions score them by default, and in which order."""

from __future__ import annotations

import difflib
import inspect
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from cohort.actors.errors import CohortError
from cohort.actors.records import Messages, Prompt, derive_seed
from cohort.rewards.base import RewardLoadError, error_tail, load_attribute, resolve_path
from cohort.rewards.config import RewardFunctionConfig, TaskConfig
from cohort.rewards.rates import NO_RATES, PassRates
from cohort.rewards.rendering import RenderError, TokenizerRenderer


class TaskError(CohortError, ValueError):
    """The task cannot give prompts; the message names the key, file or line to change."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset. id: unique within its split, the same in every epoch and run.

    source: the part of a mixture, the level, the dataset it is of: metrics and pass rates are
    counted for each source, so there should be a few dozen at most. None: not counted.
    """

    id: str
    content: Messages | str
    columns: dict[str, Any] = field(default_factory=dict)
    source: str | None = None


@runtime_checkable
class Task(Protocol):
    """What a task must offer. Its class is called with `seed=` and the keys of task.options."""

    @property
    def rewards(self) -> tuple[RewardFunctionConfig, ...]:
        """The functions used when rewards.functions is not set; may be empty."""

    def train_size(self) -> int:
        """Rows in an epoch."""

    def train_row(self, index: int) -> Row:
        """Row `index` of the training split, always the same."""

    def eval_size(self) -> int:
        """Rows held out for evaluation."""

    def eval_row(self, index: int) -> Row:
        """Row `index` of the held-out split, always the same."""


@runtime_checkable
class Demonstrates(Protocol):
    """A task that can show how it is done, for `cohort warmup`."""

    def demonstration(self, row: Row, epoch: int) -> str | None:
        """A good answer to a row of this task, as the model should write it; None: has none.

        The same for the same row and epoch. A task that knows several answers gives others in
        other epochs (counted from 0). `cohort warmup` learns from training rows; of held-out rows
        it only measures the likelihood.
        """


@runtime_checkable
class Curriculum(Protocol):
    """What a task may offer besides: to choose the order of its training rows itself."""

    def choose(self, seed: int, cursor: int, rates: PassRates) -> tuple[int, Row]:
        """The row at position `cursor` of the endless training sequence, and its epoch.

        A pure function of its arguments, for runs are resumed from them. rates: see
        `cohort.rewards.rates`. A row must not come twice in an epoch.
        """


@runtime_checkable
class Fingerprinted(Protocol):
    """A task that knows digests of all of its rows, by name; others are known by some of them."""

    def fingerprint(self) -> dict[str, str]:
        """Other digests for other rows, or for the same ones in another order."""


@runtime_checkable
class Measures(Protocol):
    """A task with metrics of its own, which `cohort eval` reports."""

    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Metrics by name over held-out rows; one completion for each row, rows may repeat."""


# Built-in tasks -----------------------------------------------------------------------------------


class AdditionTask:
    """Sums of two numbers in [min_operand, max_operand], asked in a chat message.

    A fifth of the unordered pairs, chosen by the seed, is held out: 3 + 4 and 4 + 3 are on the
    same side. Options: max_operand (9), min_operand (1).
    """

    rewards = (RewardFunctionConfig(path="cohort.rewards.answer:exact_number", weight=1.0),)
    HOLD_OUT_EVERY = 5

    def __init__(self, seed: int, max_operand: int = 9, min_operand: int = 1) -> None:
        for name, value in (("max_operand", max_operand), ("min_operand", min_operand)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 999:
                raise TaskError(f"task.options.{name} must be a whole number 0-999, got {value!r}")
        if min_operand >= max_operand:
            raise TaskError(
                f"task.options.min_operand={min_operand} must be less than "
                f"task.options.max_operand={max_operand}"
            )
        operands = range(min_operand, max_operand + 1)
        pairs = [(a, b) for a in operands for b in operands if a <= b]
        random.Random(derive_seed(seed, "addition", "split")).shuffle(pairs)
        held_out = set(pairs[:: self.HOLD_OUT_EVERY])
        self._train = _both_orders(pair for pair in pairs if pair not in held_out)
        self._eval = _both_orders(held_out)

    def train_size(self) -> int:
        return len(self._train)

    def train_row(self, index: int) -> Row:
        return self._row(self._train[index])

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        return self._row(self._eval[index])

    def demonstration(self, row: Row, epoch: int) -> str:  # noqa: ARG002
        """The sum, which is the only answer."""
        return str(row.columns["answer"])

    @staticmethod
    def _row(pair: tuple[int, int]) -> Row:
        a, b = pair
        text = f"What is {a} + {b}? Reply with the number only."
        return Row(f"{a}+{b}", [{"role": "user", "content": text}], {"answer": a + b})


def _both_orders(pairs: Any) -> list[tuple[int, int]]:
    return sorted({pair for a, b in pairs for pair in ((a, b), (b, a))})


# Loading ------------------------------------------------------------------------------------------

# By path, like tasks of one's own: a task's module is imported when it is wanted.
BUILT_IN = {
    "addition": "cohort.rewards.tasks:AdditionTask",
    "dataset": "cohort.rewards.dataset:DatasetTask",
    "reasoning_gym": "cohort.rewards.reasoning_gym:ReasoningGymTask",
    "mixture": "cohort.rewards.mixture:MixtureTask",
    "travel": "cohort.rewards.travel.task:TravelTask",
}


def load_task(config: TaskConfig, seed: int) -> Task:
    """The task that the config names: a built-in one, module:Class or path.py:Class.

    A class of one's own is called as `Class(seed=seed, **task.options)`. Raises TaskError: unknown
    name or option (with what there is), missing data file, bad row (file and line), a class that
    raises or is not a Task, a split without rows.
    """
    if config.name == "dataset":
        if not config.data:
            raise TaskError("task.data: required by task.name=dataset")
        given: dict[str, Any] = {"data": config.data, "eval_data": config.eval_data}
    elif config.data or config.eval_data:
        raise TaskError(f"task.data is only read by task.name=dataset, not by {config.name}")
    else:
        given = {"seed": seed}
    task = _construct(_task_class(config.name), config, given)
    if not isinstance(task, Task):
        wanted = ("rewards", "train_size", "train_row", "eval_size", "eval_row")
        missing = ", ".join(name for name in wanted if not hasattr(task, name))
        raise TaskError(f"task.name={config.name}: {type(task).__name__} has no {missing}")
    for split, size in (("training", task.train_size()), ("held-out", task.eval_size())):
        if size < 1:
            raise TaskError(f"task.name={config.name}: no {split} rows")
    return task


def _task_class(name: str) -> type:
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TaskError(
            f"task.name={name}: unknown task{hint} "
            f"(built in: {', '.join(BUILT_IN)}; your own: module:Class or path.py:Class)"
        )
    try:
        found = load_attribute(resolve_path(path, Path.cwd()))
    except RewardLoadError as error:
        raise TaskError(f"task.name={name}: {error}") from error
    if not inspect.isclass(found):
        raise TaskError(f"task.name={name} is not a class")
    return found


def _construct(cls: type, config: TaskConfig, given: dict[str, Any]) -> Any:
    parameters = inspect.signature(cls).parameters
    options = [name for name in parameters if name not in given]
    if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        for name in config.options:
            if name not in options:
                raise TaskError(
                    f"task.options.{name}: unknown option of task {config.name}; "
                    f"it has {', '.join(options) or 'none'}"
                )
    for name in options:
        item = parameters[name]
        required = item.default is item.empty and item.kind not in (
            item.VAR_KEYWORD,
            item.VAR_POSITIONAL,
        )
        if required and name not in config.options:
            raise TaskError(f"task.options.{name}: required by task {config.name}")
    try:
        return cls(**given, **config.options)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"task.name={config.name}: {cls.__name__} failed:\n{error_tail(error)}"
        ) from error


# Order and rendering ------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def row_order(seed: int, epoch: int, size: int) -> Sequence[int]:
    """The numbers 0 to size - 1 in the order of an epoch."""
    order = array("q", range(size))  # 8 bytes a row
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def sample_rows(
    task: Task, seed: int, cursor: int, count: int, rates: PassRates = NO_RATES
) -> list[tuple[int, Row]]:
    """Rows `cursor` to `cursor + count - 1` of the endless training sequence, with their epochs.

    A pure function of (seed, cursor), and of the pass rates when the task is a Curriculum. Other
    tasks get epochs that hold every row once, each in an order of its own.
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


class PromptRenderer:
    """Turns rows into prompts: the chat template is rendered here, once, to token ids.

    A last message of the assistant is the beginning of the answer: the model goes on from there.

    tokenizer: a transformers tokenizer. max_prompt_tokens: the longest prompt that leaves room for
    a completion; None for no bound. on_overlong: what is done with a training prompt that is
    longer. template_arguments: given to the chat template; raises TaskError for one that it does
    not read.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt_tokens: int | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        on_overlong: Literal["error", "drop"] = "drop",
    ) -> None:
        self._tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.on_overlong = on_overlong
        try:
            self._tokens = TokenizerRenderer(tokenizer, template_arguments)
        except RenderError as error:
            raise TaskError(str(error)) from error

    def render(self, row: Row, epoch: int, cursor: int = 0) -> Prompt:
        """The prompt of a row; its id is stable over resume. Never cut, even when too long.

        cursor: the row's position, named in errors. Raises TaskError: messages without a chat
        template, a template that refuses them, a text that the tokenizer refuses, no tokens at all.
        """
        where = f"row {row.id} (epoch {epoch}, position {cursor})"
        try:
            if isinstance(row.content, str):
                token_ids = tuple(self._tokens.plain(row.content))
            else:
                token_ids = tuple(self._tokens.chat(row.content))
        except RenderError as error:
            raise TaskError(f"{where}: {error}") from error
        if not token_ids:
            raise TaskError(f"{where}: the prompt has no tokens")
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        prompt_id = f"{epoch}-{row.id}"
        return Prompt(prompt_id, token_ids, row.content, row.columns, epoch, text, row.source)

    def continuation(self, text: str) -> tuple[int, ...]:
        """The tokens with which the model would say `text` and stop after a prompt.

        Raises TaskError when the tokenizer has no end-of-sequence token.
        """
        # By itself: the template ends before the answer, and so does the last token of the prompt.
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        if end is None:
            raise TaskError("the model's tokenizer has no end-of-sequence token to stop at")
        return (*token_ids, end)


def split_overlong(
    prompts: Sequence[Prompt], limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts of at most `limit` tokens, longer ones), each in the given order."""
    if limit is None:
        return list(prompts), []
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    overlong = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    return fitting, overlong


@dataclass(frozen=True)
class SampledPrompts:
    """Prompts for a step, those left out as too long, and the cursor after all of them."""

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
    """The next `count` training prompts from `cursor` on that are not too long.

    A pure function of (seed, cursor, rates), so that a resumed run takes the same ones. Raises
    TaskError when a whole epoch's worth of rows has no prompt that fits, for a prompt that is too
    long where the renderer says that this is an error, and for two rows of one epoch with the same
    id.
    """
    prompts: list[Prompt] = []
    overlong: list[Prompt] = []
    taken: set[str] = set()
    since_last = 0
    while len(prompts) < count:
        ((epoch, row),) = sample_rows(task, seed, cursor, 1, rates)
        prompt = renderer.render(row, epoch, cursor)
        cursor += 1
        if prompt.id in taken:
            raise TaskError(
                f"two rows of an epoch have the id {row.id}: a row's id must be its own "
                f"({type(task).__name__}.train_row)"
            )
        taken.add(prompt.id)
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
