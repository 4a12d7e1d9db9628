"""What a reward function may return and log, and the verdict that it becomes.

A result is a list (or tuple, or numpy array) with one entry a completion:

    a number         the value
    None             the function does not apply
    a dict           its "score" is the value; its other entries are parts that are logged
    an exception     this completion could not be judged; the others keep their values

or one dict of such lists: {"score": [...], "part": [...], ...}. Parts that are numbers become
metrics, other parts are shown with the completion.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from actors.records import Group, RewardError

Cause = Literal["raised", "timeout", "wrong_length", "wrong_type", "died"]

MAX_MESSAGE = 2000
# Bounds on what one function logs about one group: names become metrics, texts go to disk.
MAX_NAMES = 64
MAX_NAME = 100
MAX_TEXT = 2000
NUMBERS = (bool, int, float, np.bool_, np.integer, np.floating)


@dataclass(frozen=True)
class Verdict:
    """What one function said about one group of n completions.

    values: n entries, None where it did not apply or failed. parts: name -> n numbers or None.
    extra: name -> n entries for people (texts, numbers, None). metrics: name -> the values given to
    `log_metric`. broke: the call as a whole gave nothing, so that judging the completions one by
    one may give more.
    """

    values: tuple[float | None, ...]
    errors: tuple[RewardError, ...] = ()
    parts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    extra: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    broke: bool = False


class Log:
    """TRL's `log_extra` and `log_metric` for one call of a reward function.

    `log_extra(column, values)` shows one value a completion; several calls for one column add up.
    `log_metric(name, value)` logs the mean of its values over the step. They raise ValueError for
    names and values that cannot be logged.
    """

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        shown = [_shown_value(value) for value in values]
        self.extra.setdefault(_checked_name(column, self.extra, "log_extra"), []).extend(shown)

    def log_metric(self, name: str, value: Any) -> None:
        number = as_number(value)
        if number is None:
            raise ValueError(f"log_metric({name!r}) got {described(value)}, not a finite number")
        self.metrics.setdefault(_checked_name(name, self.metrics, "log_metric"), []).append(number)


def read_result(name: str, group: Group, result: Any, log: Log) -> Verdict:
    """The verdict of function `name` that returned `result` for the group.

    A result that is not a list or a dict with a "score" ("wrong_type") and one of another length
    ("wrong_length") fail every completion; an entry that is neither a finite number nor None
    ("wrong_type"), or an exception ("timeout", "raised"), fails its completion only.
    """
    n = len(group.completions)
    columns: dict[str, Any] = {}
    if isinstance(result, dict):
        if "score" not in result:
            return failed(name, group, "wrong_type", "returned a dict without 'score'")
        columns = dict(result)
        result = columns.pop("score")
    if not isinstance(result, (list, tuple, np.ndarray)):
        kind = type(result).__name__
        return failed(
            name, group, "wrong_type", f"returned a {kind}, not a list of numbers or None"
        )
    lengths = {"": result, **columns, **{f"log_extra {key}": v for key, v in log.extra.items()}}
    for what, entries in lengths.items():
        size = len(entries) if isinstance(entries, (list, tuple, np.ndarray)) else None
        if size != n:
            said = f"returned {len(result)} values" if not what else f"{what}: {size} values"
            return failed(name, group, "wrong_length", f"{said} for {n} completions")
    values: list[float | None] = []
    errors: list[RewardError] = []
    rows: list[dict[str, Any]] = []
    for position, (item, completion) in enumerate(zip(result, group.completions, strict=True)):
        row = {key: entries[position] for key, entries in columns.items()}
        if isinstance(item, dict):
            row.update(item)
            item = row.pop("score", _MISSING)
        value, cause, message = _read_value(item)
        values.append(value)
        rows.append(row)
        if cause is not None:
            errors.append(RewardError(name, completion.id, cause, message[-MAX_MESSAGE:]))
    parts, extra = _read_parts(rows)
    return Verdict(
        tuple(values),
        tuple(errors),
        parts,
        {**extra, **{key: tuple(entries) for key, entries in log.extra.items()}},
        {key: tuple(entries) for key, entries in log.metrics.items()},
    )


def failed(name: str, group: Group, cause: Cause, message: str, broke: bool = False) -> Verdict:
    """The verdict of a function that gave no value for any completion of the group."""
    short = message[-MAX_MESSAGE:]
    return Verdict(
        (None,) * len(group.completions),
        tuple(RewardError(name, completion.id, cause, short) for completion in group.completions),
        broke=broke,
    )


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict out of the verdicts on each completion."""
    sizes = [len(verdict.values) for verdict in verdicts]

    def joined(tables: Sequence[Mapping[str, tuple[Any, ...]]]) -> dict[str, tuple[Any, ...]]:
        names = dict.fromkeys(key for table in tables for key in table)
        return {
            key: tuple(
                value
                for table, size in zip(tables, sizes, strict=True)
                for value in table.get(key, (None,) * size)
            )
            for key in names
        }

    metric_names = dict.fromkeys(key for verdict in verdicts for key in verdict.metrics)
    return Verdict(
        tuple(value for verdict in verdicts for value in verdict.values),
        tuple(error for verdict in verdicts for error in verdict.errors),
        joined([verdict.parts for verdict in verdicts]),
        joined([verdict.extra for verdict in verdicts]),
        {key: tuple(v for d in verdicts for v in d.metrics.get(key, ())) for key in metric_names},
    )


def reordered(verdict: Verdict, order: Sequence[int]) -> Verdict:
    """The verdict on the same completions in another order: place i is what was place order[i]."""

    def rows(table: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        return {key: tuple(row[place] for place in order) for key, row in table.items()}

    values = tuple(verdict.values[place] for place in order)
    return replace(verdict, values=values, parts=rows(verdict.parts), extra=rows(verdict.extra))


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON holds it."""
    return {
        "values": verdict.values,
        "errors": [[item.completion_id, item.cause, item.message] for item in verdict.errors],
        "parts": verdict.parts,
        "extra": verdict.extra,
        "metrics": verdict.metrics,
        "broke": verdict.broke,
    }


def from_json(name: str, reply: Any, n: int) -> Verdict:
    """The verdict on n completions that a process sent; raises ValueError when it is garbled.

    Everything is checked: foreign code may have forged it.
    """
    try:
        verdict = Verdict(
            tuple(_optional_number(value) for value in reply["values"]),
            tuple(
                RewardError(name, str(i), c, str(m)[-MAX_MESSAGE:]) for i, c, m in reply["errors"]
            ),
            {
                str(key): tuple(_optional_number(v) for v in row)
                for key, row in reply["parts"].items()
            },
            {str(key): tuple(_shown_value(v) for v in row) for key, row in reply["extra"].items()},
            {str(key): tuple(float(v) for v in row) for key, row in reply["metrics"].items()},
            bool(reply["broke"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"a garbled reply: {type(error).__name__}") from error
    rows = [verdict.values, *verdict.parts.values(), *verdict.extra.values()]
    if any(len(row) != n for row in rows):
        raise ValueError("a garbled reply: it is not about every completion")
    return verdict


_MISSING = object()


def _read_value(item: Any) -> tuple[float | None, Cause | None, str]:
    """(value, None, "") or (None, cause of failure, message)."""
    if item is None:
        return None, None, ""
    if isinstance(item, Exception):
        return None, "timeout" if isinstance(item, TimeoutError) else "raised", error_tail(item)
    if item is _MISSING:
        return None, "wrong_type", "returned a dict without 'score'"
    value = as_number(item)
    if value is None:
        return None, "wrong_type", f"returned {described(item)}, not a finite number or None"
    return value, None, ""


def _read_parts(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, tuple[float | None, ...]], dict[str, tuple[Any, ...]]]:
    """(columns of numbers, other columns); a number that is not finite is None."""
    names: dict[str, None] = {}
    for row in rows:
        for key in row:
            names[_checked_name(key, names, "a part")] = None
    parts: dict[str, tuple[float | None, ...]] = {}
    extra: dict[str, tuple[Any, ...]] = {}
    for key in names:
        column = [row.get(key) for row in rows]
        if all(value is None or isinstance(value, NUMBERS) for value in column):
            parts[key] = tuple(as_number(value) for value in column)
        else:
            extra[key] = tuple(_shown_value(value) for value in column)
    return parts, extra


def _checked_name(name: Any, known: Mapping[str, Any], what: str) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"{what}: the name must be a text of 1 to {MAX_NAME} characters")
    if name not in known and len(known) >= MAX_NAMES:
        raise ValueError(f"{what}: more than {MAX_NAMES} names")
    return name


def as_number(value: Any) -> float | None:
    """The value as a finite float, or None when it is not one."""
    if not isinstance(value, NUMBERS):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _optional_number(value: Any) -> float | None:
    return None if value is None else float(value)


def _shown_value(value: Any) -> Any:
    """The value as JSON holds it, texts cut to MAX_TEXT."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, NUMBERS):
        number = as_number(value)
        whole = isinstance(value, (int, np.integer)) and number is not None and abs(number) < 2**53
        return int(value) if whole else number
    return str(value)[:MAX_TEXT]


def described(value: Any) -> str:
    """A value in an error message."""
    # Only plain values are printed: repr() of anything else is foreign code, of any length.
    if isinstance(value, (float, np.floating, str)):
        return f"{str(value)[:80]!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"


def error_tail(error: BaseException, limit: int = MAX_MESSAGE) -> str:
    """The last `limit` characters of an exception's traceback, the exception itself included."""
    return "".join(traceback.format_exception(error)).strip()[-limit:]
