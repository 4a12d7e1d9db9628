"""The travel reward: the total of every itinerary, with all its parts."""

from __future__ import annotations

from collections.abc import Sequence

from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.travel.query import from_columns
from cohort.rewards.travel.scores import evaluate


@per_completion
def itinerary(
    completions: Sequence[object], query: Sequence[dict[str, object] | None], **_: object
) -> list[dict[str, float] | None]:
    """The total of each plan, with the parts of its evaluation.

    Args:
        completions: Texts, or lists of messages.
        query: The column of the travel task; None where a row has none.

    Returns:
        For each completion `score`, in [0, 1.5] and at least 1 exactly where the plan breaks no
        rule, and the parts, with one for each rule that applies. None where the row has no query.
    """
    found: list[dict[str, float] | None] = []
    for text, columns in zip(completion_texts(completions), query, strict=True):
        if columns is None:
            found.append(None)
            continue
        evaluation = evaluate(from_columns(columns), text)
        found.append({"score": evaluation.total, **evaluation.parts})
    return found
