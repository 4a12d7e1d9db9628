"""What a task knows of its rows before they are made and rendered: sizes and sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from cohort.rewards.task import Task

UNKNOWN = -1


@dataclass(frozen=True)
class Survey:
    """Sizes and sources of a task's rows.

    train_bytes, eval_bytes: of each row's prompt in UTF-8, UNKNOWN where the task does not say.
    sources: of all rows; None where the task does not say.
    """

    train_bytes: np.ndarray
    eval_bytes: np.ndarray
    sources: frozenset[str] | None


@runtime_checkable
class Surveys(Protocol):
    """A task that knows the sizes of its rows: where not all are rendered, the longest are."""

    def survey(self) -> Survey:
        """See Survey."""


def survey_of(task: Task) -> Survey:
    """The task's own survey; one that knows nothing for a task without."""
    if isinstance(task, Surveys):
        return task.survey()
    train, held_out = (
        np.full(count, UNKNOWN, dtype=np.int64) for count in (task.train_size(), task.eval_size())
    )
    return Survey(train, held_out, None)
