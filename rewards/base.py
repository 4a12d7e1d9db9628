"""The reward signature, loading by dotted path, and judging one group with one function.

A reward function has TRL's signature:

    def f(prompts, completions, completion_ids, **columns) -> list[float | None]

It may be `async def`. It gets only the keyword arguments it names, or all of them if it takes
`**kwargs`. Every argument is a list with one entry a completion: `prompts` and `completions` are
strings, or lists of messages when the dataset's prompt is a list of messages (a completion is then
`[{"role": "assistant", "content": text}]`); `completion_ids` are token ids; a dataset column has
the same value n times. Arguments are to be read, not changed: entries may share one object.
The result has one number a completion, or None where the function does not apply.

This module is what a reward child process imports: it must stay light.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from actors.records import Group, RewardError

RewardFunction = Callable[..., Any]
Cause = Literal["raised", "timeout", "wrong_length", "wrong_type", "died"]

# Names the signature itself uses; a dataset column may not have them.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
MAX_MESSAGE = 2000


class RewardLoadError(ValueError):
    """A path cannot be loaded; the message names the path and what is missing."""


@dataclass(frozen=True)
class Verdict:
    """What one function said about one group: n values, None where it did not apply or failed."""

    values: tuple[float | None, ...]
    errors: tuple[RewardError, ...] = ()


# Loading ------------------------------------------------------------------------------------------


def resolve_path(path: str, base: Path) -> str:
    """Make the file of `path.py:name` absolute, from `base`; leave `module:name` as it is."""
    location, colon, name = path.rpartition(":")
    if not colon or not _is_file(location):
        return path
    file = Path(os.path.expandvars(location)).expanduser()
    return f"{(base / file).resolve()}:{name}"


def load_attribute(path: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names.

    Raises RewardLoadError: not of that form, no such file or module, the module does not import,
    no such name in it (with the nearest one).
    """
    location, colon, name = path.rpartition(":")
    if not colon or not location or not name:
        hint = ""
        if not colon and "." in path and not path.endswith(".py"):
            hint = f"; did you mean {':'.join(path.rsplit('.', 1))}?"
        raise RewardLoadError(f"'{path}' must be module:name or path/to/file.py:name{hint}")
    module = _load_file(path, location) if _is_file(location) else _load_module(path, location)
    if name not in vars(module):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(public) or 'none'}"
        raise RewardLoadError(f"'{path}': no '{name}' in {location}; {hint}")
    return vars(module)[name]


def load_function(path: str) -> RewardFunction:
    """The reward function that `module:function` or `path/to/file.py:function` names.

    Raises RewardLoadError as `load_attribute` does, and for something that is not a function.
    """
    found = load_attribute(path)
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise RewardLoadError(f"'{path}' is {kind}, not a function")
    return found


def _is_file(location: str) -> bool:
    return location.endswith(".py") or os.sep in location


def _load_module(path: str, location: str) -> ModuleType:
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name is not None and (
            location == error.name or location.startswith(error.name + ".")
        ):
            raise RewardLoadError(
                f"'{path}': no module named '{error.name}' for {sys.executable} "
                "(for a file, write path/to/file.py:name)"
            ) from error
        raise RewardLoadError(_import_failed(path, location, error)) from error
    except Exception as error:
        raise RewardLoadError(_import_failed(path, location, error)) from error


def _load_file(path: str, location: str) -> ModuleType:
    file = Path(os.path.expandvars(location)).expanduser().resolve()
    if not file.is_file():
        raise RewardLoadError(f"'{path}': no file {file} on {platform.node()}")
    digest = hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    name = f"cohort_file_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardLoadError(f"'{path}': {file} is not a Python file")
    # As for a script, the file's neighbours can be imported; last, so that they shadow nothing.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardLoadError(_import_failed(path, str(file), error)) from error
    return module


def _import_failed(path: str, location: str, error: BaseException) -> str:
    return f"'{path}': importing {location} failed:\n{error_tail(error)}"


def error_tail(error: BaseException, limit: int = MAX_MESSAGE) -> str:
    """The last `limit` characters of an exception's traceback, the exception itself included."""
    return "".join(traceback.format_exception(error)).strip()[-limit:]


# Judging ------------------------------------------------------------------------------------------


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion, given as strings or as lists of messages."""
    return [item if isinstance(item, str) else str(item[-1]["content"]) for item in completions]


def arguments(function: RewardFunction, group: Group) -> dict[str, Any]:
    """The keyword arguments that `function` accepts, for all completions of the group.

    Raises TypeError when the function needs a column that the rows do not have.
    """
    n = len(group.completions)
    content = group.prompt.content
    offered: dict[str, Any] = {name: [value] * n for name, value in group.prompt.columns.items()}
    offered["prompts"] = [content] * n
    offered["completions"] = [
        item.text if isinstance(content, str) else [{"role": "assistant", "content": item.text}]
        for item in group.completions
    ]
    offered["completion_ids"] = [item.token_ids.tolist() for item in group.completions]
    parameters = inspect.signature(function).parameters.values()
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        accepted = offered
    else:
        accepted = {item.name: offered[item.name] for item in parameters if item.name in offered}
    missing = [
        item.name
        for item in parameters
        if item.default is item.empty
        and item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
        and item.name not in offered
    ]
    if missing:
        columns = ", ".join(group.prompt.columns) or "none"
        raise TypeError(f"the rows have no column {', '.join(missing)}; their columns: {columns}")
    return accepted


def judge(
    function: RewardFunction,
    name: str,
    group: Group,
    run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run,
) -> Verdict:
    """Call `function` on the group and check what it returns; never raises for its mistakes.

    run: runs the coroutine of an `async` function. A long-lived caller passes one that keeps its
    event loop, so that clients that the function caches stay usable.

    An exception ("raised"), a result that is not a list ("wrong_type") and one of another length
    ("wrong_length") fail every completion; a value that is not a finite number or None
    ("wrong_type") fails its completion only.
    """
    try:
        result = function(**arguments(function, group))
        if inspect.isawaitable(result):
            result = run(_await(result))
    # A boundary to code of others: whatever it raises becomes a value that the run counts.
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001
        return failed(name, group, "raised", error_tail(error))
    if not isinstance(result, (list, tuple, np.ndarray)):
        kind = type(result).__name__
        return failed(
            name, group, "wrong_type", f"returned a {kind}, not a list of numbers or None"
        )
    if len(result) != len(group.completions):
        message = f"returned {len(result)} values for {len(group.completions)} completions"
        return failed(name, group, "wrong_length", message)
    values: list[float | None] = []
    errors: list[RewardError] = []
    for item, completion in zip(result, group.completions, strict=True):
        value = None if item is None else _number(item)
        values.append(value)
        if item is not None and value is None:
            message = f"returned {_shown(item)}, not a finite number or None"
            errors.append(RewardError(name, completion.id, "wrong_type", message))
    return Verdict(tuple(values), tuple(errors))


def failed(name: str, group: Group, cause: Cause, message: str) -> Verdict:
    """The verdict of a function that gave no value for any completion of the group."""
    short = message[-MAX_MESSAGE:]
    return Verdict(
        (None,) * len(group.completions),
        tuple(RewardError(name, completion.id, cause, short) for completion in group.completions),
    )


async def _await(result: Any) -> Any:
    return await result


def _number(value: Any) -> float | None:
    if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    # Only plain values are printed: repr() of anything else is foreign code, of any length.
    if isinstance(value, (float, np.floating, str)):
        return f"{str(value)[:80]!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"


def combine(
    completion_ids: Sequence[str],
    by_function: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    errors: Iterable[RewardError],
) -> tuple[float | None, ...]:
    """The total reward of each completion: the weighted sum over the functions that gave a value.

    None, never 0, when no function gave a value, or when one failed for that completion. A
    function of weight 0 is only watched: neither its values nor its failures touch the total.
    """
    counted = [name for name in by_function if weights[name] != 0]
    broken = {error.completion_id for error in errors if error.function in counted}
    totals: list[float | None] = []
    for position, completion_id in enumerate(completion_ids):
        parts = [(weights[name], by_function[name][position]) for name in counted]
        terms = [weight * value for weight, value in parts if value is not None]
        totals.append(sum(terms) if terms and completion_id not in broken else None)
    return tuple(totals)
