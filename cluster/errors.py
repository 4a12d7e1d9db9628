"""The error of a run that cannot start."""

from __future__ import annotations

from cohort.actors.errors import CohortError


class RunError(CohortError):
    """The run cannot start; the message says why and which key to change."""
