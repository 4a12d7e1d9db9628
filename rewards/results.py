"""What a reward function may return and log, and the RewardResult that it becomes.

A result has one entry a completion, as a list, tuple, array, tensor, pandas Series or generator:

    a number         the value, within ±MAX_SCORE; numpy's, Decimal, Fraction and 0-d tensors too
    None             the function does not apply
    a dict           its "score" is the value; its other entries are parts that are logged
    an exception     this completion could not be scored; the others keep their values

or one dict of such lists: {"score": [...], "part": [...], ...}. Parts that are numbers become
metrics, other parts are shown with the completion; what has no name of 1 to MAX_NAME characters, or
comes after MAX_NAMES names, is left out with a warning.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

import numpy as np

from cohort.actors.plain import JsonObject
from cohort.actors.records import Group, RewardError

logger = logging.getLogger(__name__)

Cause = Literal["raised", "timeout", "wrong_length", "wrong_type", "died"]
CAUSES = frozenset(get_args(Cause))

MAX_MESSAGE = 2000
# Bounds on what one function logs about one group: names become metrics, texts go to disk.
MAX_NAMES = 64
MAX_NAME = 100
MAX_TEXT = 2000
# Of a generator; a group is never that large.
MAX_ENTRIES = 1 << 16
NUMBERS = (bool, int, float, Decimal, Fraction, np.bool_, np.integer, np.floating)
# Beyond it, squares and sums of a group leave float32, in which the learner works.
MAX_SCORE = 1e30


@runtime_checkable
class SupportsToList(Protocol):
    """An array of numpy, torch, jax or pandas."""

    def tolist(self) -> object: ...


@runtime_checkable
class HasItem(Protocol):
    """An array or tensor of any number of dimensions."""

    shape: object

    def item(self) -> object: ...


T = TypeVar("T")


@dataclass(frozen=True)
class RewardResult:
    """The scores of one function for one group of n completions.

    Attributes:
        values: n scores, None where the function did not apply or failed.
        errors: Of single completions.
        parts: Name -> n numbers or None.
        extra: Name -> n entries for people (texts, numbers, None).
        metrics: Name -> the values given to `log_metric`.
        broke: The call as a whole gave nothing, so that scoring the completions one by one may give
            more.
    """

    values: tuple[float | None, ...]
    errors: tuple[RewardError, ...] = ()
    parts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    extra: dict[str, tuple[object, ...]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    broke: bool = False


class Log:
    """TRL's `log_extra` and `log_metric` for one call of a reward function."""

    def __init__(self) -> None:
        self.extra: dict[str, list[object]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        """Show one value a completion; several calls for one column add up.

        Raises:
            ValueError: The name cannot be logged.
        """
        shown = [shown_value(value) for value in values]
        self.extra.setdefault(checked_name(column, self.extra, "log_extra"), []).extend(shown)

    def log_metric(self, name: str, value: object) -> None:
        """Log the mean of its values over the step.

        Raises:
            ValueError: The name or the value cannot be logged.
        """
        number = as_number(value)
        if number is None:
            raise ValueError(f"log_metric({name!r}) got {described(value)}, not a finite number")
        self.metrics.setdefault(checked_name(name, self.metrics, "log_metric"), []).append(number)


def read_result(name: str, group: Group, result: object, log: Log) -> RewardResult:
    """What a function returned, checked.

    A result that is not a list or a dict with a "score" ("wrong_type") and one of another length
    ("wrong_length") fail every completion; an entry that is neither a finite number nor None
    ("wrong_type"), or an exception ("timeout", "raised"), fails its completion only.

    Args:
        name: Of the function, for errors.
        group: What it scored.
        result: What it returned.
        log: What it logged.
    """
    n = len(group.completions)
    columns: JsonObject = {}
    if isinstance(result, dict):
        if "score" not in result:
            return failed(name, group, "wrong_type", "returned a dict without 'score'")
        columns = {key: _listed(value) for key, value in result.items() if key != "score"}
        result = result["score"]
    entries = _listed(result)
    if entries is None:
        kind = type(result).__name__
        return failed(
            name, group, "wrong_type", f"returned a {kind}, not a list of numbers or None"
        )
    lengths = {"": entries, **columns, **{f"log_extra {key}": v for key, v in log.extra.items()}}
    for what, rows in lengths.items():
        size = None if rows is None else len(rows)
        if size != n:
            message = f"returned {size} values" if not what else f"{what}: {size} values"
            return failed(name, group, "wrong_length", f"{message} for {n} completions")
    values: list[float | None] = []
    errors: list[RewardError] = []
    parts_of: list[dict[str, object]] = []
    for position, (item, completion) in enumerate(zip(entries, group.completions, strict=True)):
        row = {key: rows[position] for key, rows in columns.items() if rows is not None}
        if isinstance(item, dict):
            row.update(item)
            item = row.pop("score", _MISSING)
        value, cause, message = _read_value(item)
        values.append(value)
        parts_of.append(row)
        if cause is not None:
            errors.append(RewardError(name, completion.id, cause, message[-MAX_MESSAGE:]))
    parts, extra = _read_parts(parts_of, log.extra, name)
    return RewardResult(
        tuple(values),
        tuple(errors),
        parts,
        {**extra, **{key: tuple(entries) for key, entries in log.extra.items()}},
        {key: tuple(entries) for key, entries in log.metrics.items()},
    )


def failed(
    name: str, group: Group, cause: Cause, message: str, broke: bool = False
) -> RewardResult:
    """The result of a function that gave no score for any completion.

    Args:
        name: Of the function.
        group: What it should have scored.
        cause: Of every completion's error.
        message: Its last MAX_MESSAGE characters are kept.
        broke: See RewardResult.
    """
    short = message[-MAX_MESSAGE:]
    return RewardResult(
        (None,) * len(group.completions),
        tuple(RewardError(name, completion.id, cause, short) for completion in group.completions),
        broke=broke,
    )


def merged(results: Sequence[RewardResult]) -> RewardResult:
    """One result of several, for the completions of all of them in this order."""
    sizes = [len(result.values) for result in results]

    def joined(
        tables: Sequence[Mapping[str, tuple[T | None, ...]]],
    ) -> dict[str, tuple[T | None, ...]]:
        names = dict.fromkeys(key for table in tables for key in table)
        return {
            key: tuple(
                value
                for table, size in zip(tables, sizes, strict=True)
                for value in table.get(key, (None,) * size)
            )
            for key in names
        }

    metric_names = dict.fromkeys(key for result in results for key in result.metrics)
    return RewardResult(
        tuple(value for result in results for value in result.values),
        tuple(error for result in results for error in result.errors),
        joined([result.parts for result in results]),
        joined([result.extra for result in results]),
        {key: tuple(v for d in results for v in d.metrics.get(key, ())) for key in metric_names},
    )


def reordered(result: RewardResult, order: Sequence[int]) -> RewardResult:
    """A result for the same completions in another order.

    Args:
        result: The result.
        order: Place i gets what was at place order[i].
    """

    def rows(table: Mapping[str, tuple[T, ...]]) -> dict[str, tuple[T, ...]]:
        return {key: tuple(row[place] for place in order) for key, row in table.items()}

    values = tuple(result.values[place] for place in order)
    return replace(result, values=values, parts=rows(result.parts), extra=rows(result.extra))


_MISSING = object()


def _listed(value: object) -> list[object] | None:
    """The entries of a list, tuple, array, tensor, Series or generator; None for others."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set)):
        return None
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, SupportsToList):
        # Before iterating: a tensor's entries are tensors, and a Series may have any index.
        found = value.tolist()
        return found if isinstance(found, list) else None
    if isinstance(value, Iterable):
        return list(itertools.islice(value, MAX_ENTRIES))
    return None


def _read_value(item: object) -> tuple[float | None, Cause | None, str]:
    """(value, None, "") or (None, cause of failure, message)."""
    if item is None:
        return None, None, ""
    if isinstance(item, Exception):
        return None, "timeout" if isinstance(item, TimeoutError) else "raised", error_tail(item)
    if item is _MISSING:
        return None, "wrong_type", "returned a dict without 'score'"
    value, wrong = _read_number(item)
    return value, "wrong_type" if value is None else None, f"returned {wrong}" if wrong else ""


def _read_parts(
    rows: Sequence[Mapping[str, object]], logged: Iterable[str], function: str
) -> tuple[dict[str, tuple[float | None, ...]], dict[str, tuple[object, ...]]]:
    """(columns of numbers, other columns); a number that is not finite is None.

    What has a name that cannot be logged is left out: it must not cost the scores.
    """
    names: dict[str, None] = {}
    known = dict.fromkeys(logged)
    for row in rows:
        for key in row:
            try:
                names[checked_name(key, known, "a part")] = known[key] = None
            except ValueError as error:
                _warn_once(f"{function}: not everything that it returned is logged: {error}")
    parts: dict[str, tuple[float | None, ...]] = {}
    extra: dict[str, tuple[object, ...]] = {}
    for key in names:
        column = [row.get(key) for row in rows]
        if all(value is None or isinstance(_scalar(value), NUMBERS) for value in column):
            parts[key] = tuple(as_number(value) for value in column)
        else:
            extra[key] = tuple(shown_value(value) for value in column)
    return parts, extra


@functools.lru_cache(maxsize=MAX_NAMES)
def _warn_once(message: str) -> None:
    logger.warning(message)


def checked_name(name: object, known: Mapping[str, object], what: str) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"{what}: the name must be a text of 1 to {MAX_NAME} characters")
    if encodable(name) != name:
        raise ValueError(f"{what}: the name {name!a} holds half a surrogate")
    if name not in known and len(known) >= MAX_NAMES:
        raise ValueError(f"{what}: more than {MAX_NAMES} names")
    return name


def as_number(value: object) -> float | None:
    """The value as a finite float within ±MAX_SCORE, or None when it is not one."""
    return _read_number(value)[0]


def _read_number(value: object) -> tuple[float | None, str]:
    """(value, "") or (None, what it is instead)."""
    plain = _scalar(value)
    wrong = f"{described(plain)}, not a finite number or None"
    if not isinstance(plain, NUMBERS) or isinstance(plain, np.timedelta64):
        return None, wrong
    try:
        number = float(plain)
    except OverflowError:
        # A whole number or a fraction beyond what a float holds.
        number = math.inf if plain > 0 else -math.inf
        wrong = f"{described(plain)} that is out of range"
    except (ValueError, ArithmeticError):
        return None, wrong
    if math.isfinite(number) and abs(number) > MAX_SCORE:
        wrong = f"{described(plain)}, which is out of range: it may be {MAX_SCORE:g} at most"
    return (number, "") if abs(number) <= MAX_SCORE else (None, wrong)


def _scalar(value: object) -> object:
    """What an array or tensor without dimensions holds; anything else as it is."""
    if isinstance(value, HasItem) and not isinstance(value, np.generic) and value.shape == ():
        return value.item()
    return value


def shown_value(value: object) -> object:
    """The value as JSON holds it, texts cut to MAX_TEXT."""
    value = _scalar(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, NUMBERS):
        number = as_number(value)
        whole = isinstance(value, (int, np.integer)) and number is not None and abs(number) < 2**53
        return int(value) if whole else number
    return encodable(str(value)[:MAX_TEXT])


def encodable(text: str) -> str:
    """The text without what no file can hold: half a surrogate is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def described(value: object) -> str:
    """A value in an error message."""
    # Only plain values are printed: repr() of anything else is foreign code, of any length.
    if isinstance(value, (float, np.floating, str)):
        return f"{encodable(str(value)[:80])!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"


def error_tail(error: BaseException, limit: int = MAX_MESSAGE) -> str:
    """The last `limit` characters of an exception's traceback, the exception itself included."""
    return encodable("".join(traceback.format_exception(error)).strip())[-limit:]
