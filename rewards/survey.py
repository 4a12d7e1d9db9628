"""What a task knows of its rows before it makes them: sizes and sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from cohort.rewards.task import Task

UNKNOWN = -1


@dataclass(frozen=True)
class Survey:
    """Sizes and sources of a task's rows.

    Attributes:
        train_bytes: int64, one for each training row: its prompt's bytes in UTF-8, or UNKNOWN.
        eval_bytes: The same of the held-out rows.
        sources: Of all rows; None where the task does not say.
    """

    train_bytes: np.ndarray
    eval_bytes: np.ndarray
    sources: frozenset[str] | None


@runtime_checkable
class Surveys(Protocol):
    """A task that knows the sizes of its rows, so that only the longest need rendering."""

    def survey(self) -> Survey:
        """The sizes and sources of its rows."""


def survey_of(task: Task) -> Survey:
    """The task's own survey, or one in which everything is unknown."""
    if isinstance(task, Surveys):
        return task.survey()
    train, held_out = (
        np.full(count, UNKNOWN, dtype=np.int64) for count in (task.train_size(), task.eval_size())
    )
    return Survey(train, held_out, None)
