"""The error of a run that cannot start, and other libraries' errors in one line."""

from __future__ import annotations

from cohort.actors.errors import TRY_AGAIN, CohortError


class RunError(CohortError):
    """The run cannot start; the message says why and which key to change."""


class RayLostError(RunError):
    """Ray's own processes are gone, out of reach or did not start; a new start may go on."""

    exit_code = TRY_AGAIN


def in_words(error: Exception) -> str:
    """The type and the message of a library's error, on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
