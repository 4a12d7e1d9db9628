"""The reward signature, loading by dotted path, and judging one group with one function.

A reward function has TRL's signature:

    def f(prompts, completions, completion_ids, log_extra, log_metric, **columns)
        -> list[float | None]

It may be `async def`. It gets only the keyword arguments it names, or all of them if it takes
`**kwargs`. Every argument but the last two is a list with one entry a completion: `prompts` and
`completions` are strings, or lists of messages when the dataset's prompt is a list of messages (a
completion is then `[{"role": "assistant", "content": text}]`); `completion_ids` are token ids; a
dataset column has the same value n times. Arguments are to be read, not changed: entries may share
one object. A function that names `prompt_texts` gets the prompts as the model read them; one that
names `prefills` gets what the answer begins with before the model's own words: the last message of
the prompt where it is the assistant's, else a `<think>` that the template opens ("" for others).
`completions` hold the model's own words only, special tokens included, end and padding left out.
`log_extra(column, values)` and `log_metric(name, value)` are functions, see `rewards.results`,
which also says what may be returned besides numbers and None.

A class is constructed once a process, with the function's options; its instance is called.

This module is what a reward child process imports: it must stay light.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import platform
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from actors.records import Group, RewardError
from rewards.results import Log, Verdict, error_tail, failed, read_result

RewardFunction = Callable[..., Any]

# Names the signature itself uses; a dataset column may not have them.
RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "log_extra",
    "log_metric",
    "prompt_texts",
    "prefills",
)


BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardLoadError(ValueError):
    """A path cannot be loaded; the message names the path and what is missing."""


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


def load_function(path: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward function that `module:function` or `path/to/file.py:function` names.

    options: keyword arguments that it gets at every call, or its class's constructor once.

    Raises RewardLoadError as `load_attribute` does, for something that is not a function, for an
    option that it does not have, and for a class that cannot be constructed.
    """
    found = load_attribute(path)
    given = dict(options or {})
    is_class = inspect.isclass(found)
    if not callable(found) or (is_class and not any("__call__" in vars(c) for c in found.__mro__)):
        what = "a class" if is_class else f"of type {type(found).__name__}"
        hint = " (an object that is called needs __call__)" if is_class else ""
        raise RewardLoadError(f"'{path}' is {what}, not a function{hint}")
    _check_options(path, found, given)
    if not is_class:
        return functools.partial(found, **given) if given else found
    try:
        return found(**given)
    # A boundary to code of others.
    except Exception as error:
        raise RewardLoadError(f"'{path}' cannot be constructed:\n{error_tail(error)}") from error


def _check_options(path: str, found: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(found).parameters.values()
    known = [item.name for item in parameters if item.kind is not item.VAR_KEYWORD]
    known = [name for name in known if name not in RESERVED_COLUMNS]
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters)
    for name in options:
        if name in RESERVED_COLUMNS or (name not in known and not open_ended):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise RewardLoadError(f"'{path}': unknown option '{name}'; {hint}")
    if inspect.isclass(found):
        for item in parameters:
            required = item.default is item.empty and item.kind in BY_NAME
            if required and item.name not in options:
                raise RewardLoadError(f"'{path}': option '{item.name}' is required")


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


# Judging ------------------------------------------------------------------------------------------


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion, given as strings or as lists of messages."""
    return [item if isinstance(item, str) else str(item[-1]["content"]) for item in completions]


def arguments(
    function: RewardFunction, group: Group, log: Log, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The keyword arguments that `function` accepts, for all completions of the group.

    columns: argument -> the dataset column that it gets, where their names differ.
    Raises TypeError when the function needs a column that the rows do not have.
    """
    n = len(group.completions)
    content = group.prompt.content
    row = dict(group.prompt.columns)
    shown = ", ".join(row) or "none"
    for argument, column in (columns or {}).items():
        if column not in group.prompt.columns:
            raise TypeError(f"the rows have no column {column}; their columns: {shown}")
        row[argument] = group.prompt.columns[column]
    offered: dict[str, Any] = {name: [value] * n for name, value in row.items()}
    offered["prompts"] = [content] * n
    offered["completions"] = [
        item.text if isinstance(content, str) else [{"role": "assistant", "content": item.text}]
        for item in group.completions
    ]
    offered["completion_ids"] = [item.token_ids.tolist() for item in group.completions]
    offered["log_extra"] = log.log_extra
    offered["log_metric"] = log.log_metric
    # Options are given already; a column of the same name must not replace them.
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    offered = {name: value for name, value in offered.items() if name not in fixed}
    parameters = inspect.signature(function).parameters.values()
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        accepted = offered
    else:
        accepted = {item.name: offered[item.name] for item in parameters if item.name in offered}
    if any(item.name == "prompt_texts" for item in parameters):
        accepted["prompt_texts"] = [_prompt_text(group)] * n
    if any(item.name == "prefills" for item in parameters):
        accepted["prefills"] = [group.prompt.prefill] * n
    missing = [
        item.name
        for item in parameters
        if item.default is item.empty and item.kind in BY_NAME and item.name not in accepted
    ]
    if missing:
        raise TypeError(f"the rows have no column {', '.join(missing)}; their columns: {shown}")
    return accepted


def _prompt_text(group: Group) -> str:
    """The prompt as the model read it."""
    prompt = group.prompt
    if prompt.text is not None:
        return prompt.text
    if isinstance(prompt.content, str):
        return prompt.content
    raise TypeError("this function needs the rendered prompt, and the prompt has no text")


def judge(
    function: RewardFunction,
    name: str,
    group: Group,
    run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run,
    columns: Mapping[str, str] | None = None,
) -> Verdict:
    """Call `function` on the group and check what it returns; never raises for its mistakes.

    run: runs the coroutine of an `async` function. A long-lived caller passes one that keeps its
    event loop, so that clients that the function caches stay usable. columns: see `arguments`.

    An exception ("raised") fails every completion; for results see `rewards.results`.
    """
    log = Log()
    try:
        result = function(**arguments(function, group, log, columns))
        if inspect.isawaitable(result):
            result = run(_await(result))
        return read_result(name, group, result, log)
    # A boundary to code of others: whatever it raises becomes a value that the run counts.
    except MemoryError as error:
        message = f"{error_tail(error)} (rewards.memory_gb bounds its process)"
        return failed(name, group, "raised", message, broke=True)
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001
        return failed(name, group, "raised", error_tail(error), broke=True)


async def _await(result: Any) -> Any:
    return await result


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
