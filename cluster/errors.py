"""The error of a run that cannot start, and other libraries' errors in one line."""

from __future__ import annotations

from cohort.actors.errors import CohortError


class RunError(CohortError):
    """The run cannot start; the message says why and which key to change."""


def in_words(error: Exception) -> str:
    """The type and the message of a library's error, on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
