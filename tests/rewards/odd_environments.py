"""Environments that are slow, name things as we do, or return more than they should."""

from __future__ import annotations

import time
from typing import Any

from cohort.rewards.environments.base import Reply, Step


class Slow:
    """Takes its time for each answer."""

    def reset(self, row: Any) -> None:
        self.seconds = row["takes"]

    def step(self, reply: Reply) -> Step:
        time.sleep(self.seconds)
        return Step("No.", reward=0.5)


class SlowTool:
    """The same as a tool."""

    def reset(self, takes: float) -> None:
        self.seconds, self.calls = takes, 0

    def wait(self) -> str:
        """Wait."""
        time.sleep(self.seconds)
        self.calls += 1
        return "done"

    def get_reward(self) -> float:
        return float(self.calls)


class OurNames:
    """Names an argument and columns as we name ours."""

    def reset(self, function: str = "", seed: int = 0, **row: Any) -> None:
        self.function, self.seed = function, seed

    def differentiate(self, function: str) -> str:
        """Differentiate.

        Args:
            function: What.
        """
        return f"the derivative of {function}"
