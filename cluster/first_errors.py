"""Says the first error of every kind that scoring had; metrics count all of them."""

from __future__ import annotations

import logging

from cohort.actors.records import ScoreMeta

logger = logging.getLogger(__name__)


class FirstErrors:
    """Knows which kinds of errors were said already."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def say(self, scores: ScoreMeta) -> None:
        """Log those errors of a group whose kind is new, in their own words."""
        for error in scores.errors:
            if (error.function, error.cause) not in self._said:
                self._said.add((error.function, error.cause))
                logger.warning(
                    "reward function %s (%s) on %s; further errors of this kind are only counted:"
                    "\n%s",
                    error.function,
                    error.cause,
                    error.completion_id,
                    error.message,
                )
