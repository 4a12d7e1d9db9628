"""The travel reward as reward functions: the total, and each part to be watched with weight 0.

All take the column `query` of the travel task; where a row has none, they do not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import completion_texts
from rewards.travel.query import from_columns
from rewards.travel.scores import Evaluation, evaluate

Column = Sequence[dict[str, Any] | None]
Scores = list[float | None]


def evaluations(completions: Sequence[Any], query: Column) -> list[Evaluation | None]:
    """What there is to say about each completion; None where the row has no travel query."""
    return [
        None if columns is None else evaluate(from_columns(columns), text)
        for text, columns in zip(completion_texts(completions), query, strict=True)
    ]


def itinerary(
    completions: Sequence[Any],
    query: Column,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> Scores:
    """The total of each plan, in [0, 1.5]; at least 1 exactly where the plan breaks no rule.

    log_metric: given the mean of every part as `travel/<part>`, rules included.
    """
    found = evaluations(completions, query)
    if log_metric is not None:
        for name, value in mean_parts([item for item in found if item is not None]).items():
            log_metric(f"travel/{name}", value)
    return [None if item is None else item.total for item in found]


def mean_parts(found: Sequence[Evaluation]) -> dict[str, float]:
    """The mean of every part over the evaluations that have it."""
    values: dict[str, list[float]] = {}
    for item in found:
        for name, value in item.parts.items():
            values.setdefault(name, []).append(value)
    return {name: sum(given) / len(given) for name, given in values.items()}


def schema(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """1.0 where the completion holds an itinerary in the format."""
    return _part("schema", completions, query)


def commonsense(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """Share of the commonsense rules that hold, times the coverage."""
    return _part("commonsense", completions, query)


def hard(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """Share of the hard rules that hold, 0 for a plan with something missing."""
    return _part("hard", completions, query)


def passed(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """1.0 where every rule holds."""
    return _part("passed", completions, query)


def culture(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """Cultural richness, 0 unless every rule holds."""
    return _part("culture", completions, query)


def interests(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """How well the sights match the interests, 0 unless every rule holds."""
    return _part("interests", completions, query)


def balance(completions: Sequence[Any], query: Column, **_: Any) -> Scores:
    """How even the days are, 0 unless every rule holds."""
    return _part("balance", completions, query)


def _part(name: str, completions: Sequence[Any], query: Column) -> Scores:
    found = evaluations(completions, query)
    return [None if item is None else item.parts[name] for item in found]
