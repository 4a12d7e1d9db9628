"""How many rollout actors a run wants, by how long its learner waits for completions."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

# Steps that are looked at together, since the number of actors last changed.
WINDOW = 3
# Shares of these steps' time that the learner waited: above the first there are too few actors,
# below the second too many.
TOO_FEW, TOO_MANY = 0.25, 0.02
# For so many steps a number that was found too small is not tried again.
REMEMBER = 50


@dataclass
class Demand:
    """The number of actors between two bounds that keeps the learner busy.

    Where the learner waited a share w of the time, completions came 1 / (1 - w) times too slowly:
    so many times more actors are wanted, but at most twice as many at once. Actors that are too
    many leave one at a time.

    Attributes:
        fewest: Never less than these.
        most: Never more.

    Example:
        >>> demand = Demand(1, 8)
        >>> [demand.after(step_s=10, waited_s=5, actors=2, joining=False) for _ in range(3)]
        [2, 2, 4]
    """

    fewest: int
    most: int
    _actors: int = 0
    _steps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _too_few: int = 0
    _forget_in: int = 0

    def after(self, step_s: float, waited_s: float, actors: int, joining: bool) -> int:
        """How many actors the run should have from now on.

        Args:
            step_s: Seconds that the last step took.
            waited_s: Of them, those that the learner had nothing to train on.
            actors: That the run has, newcomers included, leavers not.
            joining: Whether some of them have no weights yet: what they are worth is not known.
        """
        self._forget_in = max(0, self._forget_in - 1)
        if not self.fewest <= actors <= self.most:
            return min(max(actors, self.fewest), self.most)
        if joining or actors != self._actors:
            self._actors = actors
            self._steps.clear()
        if joining:
            return actors
        self._steps.append((step_s, waited_s))
        if len(self._steps) < WINDOW:
            return actors
        share = sum(waited for _, waited in self._steps) / sum(step for step, _ in self._steps)
        if share > TOO_FEW:
            self._too_few, self._forget_in = actors, REMEMBER
            wanted = min(2 * actors, math.ceil(actors / max(1 - share, 0.5)))
            return min(max(wanted, actors + 1), self.most)
        if share < TOO_MANY and actors > self.fewest:
            known = self._forget_in > 0 and actors - 1 <= self._too_few
            return actors if known else actors - 1
        return actors
