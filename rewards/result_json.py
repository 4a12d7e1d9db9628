"""A RewardResult on its way from the reward child, which foreign code may have forged."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cohort.actors.plain import JsonObject
from cohort.actors.records import RewardError
from cohort.rewards.results import (
    CAUSES,
    MAX_MESSAGE,
    MAX_NAMES,
    RewardResult,
    as_number,
    checked_name,
    encodable,
    shown_value,
)


def to_json(result: RewardResult) -> dict[str, object]:
    """A result as JSON holds it."""
    return {
        "values": result.values,
        "errors": [[item.completion_id, item.cause, item.message] for item in result.errors],
        "parts": result.parts,
        "extra": result.extra,
        "metrics": result.metrics,
        "broke": result.broke,
    }


def from_json(
    name: str, reply: JsonObject, n: int, ids: Collection[str] | None = None
) -> RewardResult:
    """The result that a process sent, every part of it checked.

    Args:
        name: Of the function.
        reply: What `to_json` gave, or anything else.
        n: Completions that were scored.
        ids: Of these, which errors may name; None: not checked.

    Raises:
        ValueError: The reply is garbled.
    """
    try:
        result = RewardResult(
            _numbers(reply["values"]),
            tuple(
                RewardError(name, i, c, encodable(m[-MAX_MESSAGE:])) for i, c, m in reply["errors"]
            ),
            {_checked(key): _numbers(row) for key, row in _table(reply["parts"]).items()},
            {
                _checked(key): tuple(shown_value(v) for v in row)
                for key, row in _table(reply["extra"]).items()
            },
            {_checked(key): _finite(row) for key, row in _table(reply["metrics"]).items()},
            bool(reply["broke"]),
        )
        # Unhashable where a list of them was forged.
        strange = [
            error
            for error in result.errors
            if error.cause not in CAUSES
            or not isinstance(error.completion_id, str)
            or not isinstance(error.message, str)
            or (ids is not None and error.completion_id not in ids)
        ]
    # Whatever was forged: RecursionError and MemoryError for what is nested too deep or too large.
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"a garbled reply: {type(error).__name__}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"a garbled reply: {type(error).__name__}") from None
    if strange or len(result.errors) > n:
        raise ValueError("a garbled reply: its errors are not about these completions")
    rows = [result.values, *result.parts.values(), *result.extra.values()]
    if any(len(row) != n for row in rows):
        raise ValueError("a garbled reply: it is not about every completion")
    return result


def _table(value: object) -> JsonObject:
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise ValueError("not a table")
    return value


def _checked(key: str) -> str:
    return checked_name(key, {}, "a name")


def _numbers(row: object) -> tuple[float | None, ...]:
    """JSON numbers or null, within range."""
    if not isinstance(row, (list, tuple)):
        raise TypeError("not a list")
    return tuple(None if value is None else _finite([value])[0] for value in row)


def _finite(row: Iterable[object]) -> tuple[float, ...]:
    found = [as_number(value) for value in row]
    if not isinstance(row, (list, tuple)) or None in found:
        raise ValueError("not numbers")
    return tuple(value for value in found if value is not None)
