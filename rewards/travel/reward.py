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
    """Each plan's total as `score`, in [0, 1.5]; at least 1 exactly where it breaks no rule.

    query: the column of the travel task; where a row has none, the reward does not apply. The other
    entries are the parts of the evaluation, one for every rule that applies among them.
    """
    found: list[dict[str, float] | None] = []
    for text, columns in zip(completion_texts(completions), query, strict=True):
        if columns is None:
            found.append(None)
            continue
        evaluation = evaluate(from_columns(columns), text)
        found.append({"score": evaluation.total, **evaluation.parts})
    return found
