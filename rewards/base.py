"""The signature of a reward function, and one call of it for one group.

A reward function has TRL's signature:

    def f(prompts, completions, completion_ids, log_extra, log_metric, **columns)
        -> list[float | None]

It may be `async def`. It gets only the keyword arguments it names, or all of them if it takes
`**kwargs`. Every argument but the last two is a list with one entry a completion: `prompts` and
`completions` are strings, or lists of messages when the dataset's prompt is a list of messages (a
completion is then `[{"role": "assistant", "content": text}]`); `completion_ids` are token ids; a
dataset column has the same value n times. Arguments are to be read, not changed: entries may share
one object. `trainer_state` is a `TrainerState`, unless a column has that name. A function that
names `prompt_texts` gets the prompts as the model read them; one that names `prefills` what the
answer begins with before the model's own words: the last message of the prompt where it is the
assistant's, else a `<think>` that the template opens ("" for others).
`completions` hold the model's own words only, special tokens included, end and padding left out.
`log_extra(column, values)` and `log_metric(name, value)` are functions, see
`cohort.rewards.results`, which also says what may be returned besides numbers and None.

A class is constructed once a process, with the function's options; its instance is called.

A function is called once with all of a group's completions, for it may compare them. One that
declares that it scores each completion by itself (`per_completion`) is called as they come.

This module is what a reward child process imports: it must stay light.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from cohort.actors.records import Completion, Group, Messages, RewardError
from cohort.rewards.loading import (
    BY_NAME,
    RESERVED_COLUMNS,
    RewardFunction,
    RewardLoadError,
    load_attribute,
    load_function,
    resolve_path,
    reward_path,
)
from cohort.rewards.results import MAX_SCORE, Log, RewardResult, error_tail, failed, read_result

__all__ = [
    "RESERVED_COLUMNS",
    "RewardFunction",
    "RewardLoadError",
    "TrainerState",
    "combine",
    "completion_texts",
    "load_attribute",
    "load_function",
    "per_completion",
    "resolve_path",
    "reward_path",
    "score_group",
]

Declared = TypeVar("Declared")


def per_completion(function: Declared) -> Declared:
    """Declare that a reward function, or a class of them, scores each completion by itself.

    It is then called as completions come, with one or more of a group. Setting the attribute
    `per_completion` to True declares the same, and so does `whole_group: false` in the config.

    Args:
        function: A function or a class.

    Returns:
        The same function, marked.
    """
    # mypy knows no attributes of functions.
    function.per_completion = True  # type: ignore[attr-defined]
    return function


def is_per_completion(function: RewardFunction) -> bool:
    """Whether a function declares that it scores each completion by itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "per_completion", False) is True


@dataclass(frozen=True)
class TrainerState:
    """The part of TRL's `trainer_state` that is supported.

    Attributes:
        global_step: Steps done.
        max_steps: Steps of the run.
        epoch: Of the prompt.
    """

    global_step: int
    max_steps: int
    epoch: float


# Scoring ------------------------------------------------------------------------------------------


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion, as a reward function gets them.

    Args:
        completions: Strings, or lists of messages.

    Returns:
        One text each; of a list of messages the assistant's last one.
    """
    return [
        item
        if isinstance(item, str)
        else next((str(m["content"]) for m in reversed(item) if m["role"] == "assistant"), "")
        for item in completions
    ]


def arguments(
    function: RewardFunction,
    group: Group,
    log: Log,
    columns: Mapping[str, str] | None = None,
    max_steps: int = 0,
) -> tuple[list[object], dict[str, object]]:
    """The positional and keyword arguments that `function` accepts, for the group's completions.

    Args:
        function: A reward function.
        group: What it scores.
        log: Where its `log_extra` and `log_metric` go.
        columns: Argument -> the dataset column that it gets, where their names differ.
        max_steps: Of the run.

    Raises:
        TypeError: The function needs a column that the rows do not have, or a column has the name
            of an argument that is bound already.
    """
    n = len(group.completions)
    content = group.prompt.content
    row = dict(group.prompt.columns)
    shown = ", ".join(row) or "none"
    for argument, column in (columns or {}).items():
        if column not in group.prompt.columns:
            raise TypeError(f"the rows have no column {column}; their columns: {shown}")
        row[argument] = group.prompt.columns[column]
    offered: dict[str, object] = {name: [value] * n for name, value in row.items()}
    offered["prompts"] = [content] * n
    offered["completions"] = [_shown(item, content) for item in group.completions]
    offered["completion_ids"] = [item.token_ids.tolist() for item in group.completions]
    offered["log_extra"] = log.log_extra
    offered["log_metric"] = log.log_metric
    offered.setdefault("trainer_state", _trainer_state(group, max_steps))
    # Options are given already; a column of the same name must not replace them.
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    offered = {name: value for name, value in offered.items() if name not in fixed}
    parameters = inspect.signature(function).parameters.values()
    named = {item.name for item in parameters if item.kind in BY_NAME}
    accepted = {name: offered[name] for name in named if name in offered}
    if any(item.end is not None for item in group.completions):
        offered["environments"] = [
            SimpleNamespace(**({} if item.end is None else item.end.state))
            for item in group.completions
        ]
        if "environments" in named:
            accepted["environments"] = offered["environments"]
    if "prompt_texts" in named:
        accepted["prompt_texts"] = [_prompt_text(group)] * n
    if any(item.name == "prefills" for item in parameters):
        accepted["prefills"] = [group.prompt.prefill] * n
    missing = [
        item.name
        for item in parameters
        if item.default is item.empty and item.kind in BY_NAME and item.name not in accepted
    ]
    places: list[object] = []
    for item in parameters:
        if item.kind is not item.POSITIONAL_ONLY:
            continue
        if item.name not in offered:
            if item.default is item.empty:
                missing.append(item.name)
            break
        places.append(offered[item.name])
    if missing:
        verl = {"solution_str", "ground_truth"}.issubset(named)
        hint = "; this looks like a function of verl's: set kind: verl on it" if verl else ""
        if "environments" in missing:
            hint = "; there are no environments here (task.environment)"
        lost = ", ".join(missing)
        raise TypeError(f"the rows have no column {lost}; their columns: {shown}{hint}")
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        clash = sorted(_bound_names(function) & offered.keys())
        if clash:
            raise TypeError(
                f"the column {', '.join(clash)} has the name of an argument of this function that "
                "Python has set already: give the column another name"
            )
        used = [item.name for item in parameters if item.kind is item.POSITIONAL_ONLY]
        accepted |= {name: value for name, value in offered.items() if name not in used}
    return places, accepted


def _shown(completion: Completion, content: Messages | str) -> object:
    """A completion as reward functions get it."""
    if completion.end is not None:
        return [dict(message) for message in completion.end.messages]
    if isinstance(content, str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def _bound_names(function: object) -> set[str]:
    """Arguments that are bound by their place already: a method's `self` for one."""
    if isinstance(function, functools.partial):
        own = [name for name, kind in _kinds(function.func) if kind in BY_NAME]
        return _bound_names(function.func) | set(own[: len(function.args)])
    if inspect.isfunction(function) or inspect.isclass(function) or inspect.isbuiltin(function):
        return set()
    method = function if inspect.ismethod(function) else type(function).__call__
    first = _kinds(getattr(method, "__func__", method))[:1]
    return {name for name, kind in first if kind in BY_NAME}


def _kinds(function: RewardFunction) -> list[tuple[str, object]]:
    return [(item.name, item.kind) for item in inspect.signature(function).parameters.values()]


def _trainer_state(group: Group, max_steps: int) -> TrainerState:
    # Groups of a run are named after their step; others, of evaluations say, belong to none.
    step = group.id.partition(":")[0]
    return TrainerState(int(step) if step.isdecimal() else 0, max_steps, float(group.prompt.epoch))


def _prompt_text(group: Group) -> str:
    """The prompt as the model read it."""
    prompt = group.prompt
    if prompt.text is not None:
        return prompt.text
    if isinstance(prompt.content, str):
        return prompt.content
    raise TypeError("this function needs the rendered prompt, and the prompt has no text")


def score_group(
    function: RewardFunction,
    name: str,
    group: Group,
    run: Callable[[Coroutine[object, object, object]], object] = asyncio.run,
    columns: Mapping[str, str] | None = None,
    max_steps: int = 0,
) -> RewardResult:
    """Call `function` for the group and check what it returns; its exceptions become errors.

    Args:
        function: A reward function.
        name: Its name in errors.
        group: What it scores.
        run: Runs the coroutine of an `async` function. A long-lived caller passes one that keeps
            its event loop, so that clients that the function caches stay usable.
        columns: See `arguments`.
        max_steps: See `arguments`.

    Returns:
        The result, see `cohort.rewards.results`. After an exception, every completion has an error
        with the cause "raised".
    """
    log = Log()
    try:
        places, named = arguments(function, group, log, columns, max_steps)
        result = function(*places, **named)
        if inspect.isawaitable(result):
            result = run(_await(result))
        if callable(result):
            # `function` was a factory of reward functions.
            places, named = arguments(result, group, log, columns, max_steps)
            result = result(*places, **named)
            if inspect.isawaitable(result):
                result = run(_await(result))
        return read_result(name, group, result, log)
    # Code of users: whatever it raises becomes a value that the run counts.
    except MemoryError as error:
        message = f"{error_tail(error)} (rewards.memory_gb bounds its process)"
        return failed(name, group, "raised", message, broke=True)
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001
        return failed(name, group, "raised", error_tail(error), broke=True)


async def _await(result: Any) -> object:
    return await result


def combine(
    completion_ids: Sequence[str],
    by_function: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    errors: Iterable[RewardError],
) -> tuple[float | None, ...]:
    """The total reward of each completion: the weighted sum over the functions that gave a value.

    A function of weight 0 is only watched: neither its values nor its errors touch the total.

    Args:
        completion_ids: n ids.
        by_function: Name -> n values.
        weights: Name -> factor.
        errors: Of any of these functions.

    Returns:
        n totals. None, never 0, when no function gave a value, when one failed for that completion,
        and when the sum is out of range (see `out_of_range`).
    """
    counted = [name for name in by_function if weights[name] != 0]
    broken = {error.completion_id for error in errors if error.function in counted}
    totals: list[float | None] = []
    for position, completion_id in enumerate(completion_ids):
        parts = [(weights[name], by_function[name][position]) for name in counted]
        terms = [weight * value for weight, value in parts if value is not None]
        total = sum(terms) if terms and completion_id not in broken else None
        totals.append(total if total is not None and abs(total) <= MAX_SCORE else None)
    return tuple(totals)


def out_of_range(
    completion_ids: Sequence[str],
    by_function: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
) -> list[RewardError]:
    """The errors of completions whose weighted sum is out of range.

    Args:
        completion_ids: n ids.
        by_function: Name -> n values.
        weights: Name -> factor.

    Returns:
        An error each, of the function with the largest part of the sum.
    """
    found = []
    for position, completion_id in enumerate(completion_ids):
        terms = {
            name: weights[name] * value
            for name, values in by_function.items()
            if weights[name] != 0 and (value := values[position]) is not None
        }
        # `not <=`, so that NaN is out of range as well.
        if terms and not abs(math.fsum(terms.values())) <= MAX_SCORE:
            name = max(terms, key=lambda key: abs(terms[key]))
            message = (
                f"the weighted sum of the scores is out of range: {terms[name]:g} of it is "
                f"{name}'s, and it may be {MAX_SCORE:g} at most"
            )
            found.append(RewardError(name, completion_id, "wrong_type", message))
    return found
