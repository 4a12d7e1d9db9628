"""Environments written for TRL, as its documentation shows them; they know nothing of Cohort."""

from __future__ import annotations

import enum
from typing import Any, Literal


class Counter:
    """Its state lives from call to call; the reward comes from `get_reward`."""

    def __init__(self) -> None:
        self._counter = 0

    def reset(self, **kwargs: Any) -> None:
        self._counter, self._target = 0, kwargs["target"]

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self._counter += step
        return self._counter

    def decrement(self, step: int = 1) -> int:
        """Decrement the internal counter.

        Args:
            step: Value to subtract.
        """
        self._counter -= step
        return self._counter

    def get_reward(self) -> float:
        return float(self._counter == self._target)


class Echo:
    """Its tool is called `step`, as in TRL's example for OpenEnv."""

    def reset(self, **kwargs: Any) -> str:
        self.reward = 0.0
        return f"Echo {kwargs['word']}."

    def step(self, message: str) -> str:
        """
        Echo the message back from the environment.

        Args:
            message: The message to echo

        Returns:
            The echoed message.
        """
        self.reward = len(message)
        return message

    def get_reward(self) -> float:
        return self.reward


class Level(enum.Enum):
    LOW = "low"


class Board:
    """Hints of every kind, `async`, inherited, static; and public names that are no tools."""

    Level = Level
    size = 3

    def reset(self, **kwargs: Any) -> None:
        self.moves: list[Any] = []

    @property
    def cells(self) -> list[int]:
        raise RuntimeError("not to be evaluated")

    @classmethod
    def of_size(cls, size: int) -> Board:
        return cls()

    async def move(
        self, direction: Literal["up", "down"], cells: list[int], note: str | None = None
    ) -> dict[str, Any]:
        """Move on the board.

        Args:
            direction: Where to. (choices: ["up", "down"])
            cells: Which cells.
            note: What to remember.
        """
        self.moves.append((direction, cells))
        return {"moves": len(self.moves)}

    @staticmethod
    def rules(topic: str) -> str:
        """Say a rule.

        Args:
            topic: Of what.
        """
        return f"no {topic}"

    def _secret(self) -> None:
        raise RuntimeError


class Larger(Board):
    def jump(self, over: dict[str, int], far: bool = False) -> str:
        """Jump over cells.

        Args:
            over: How many, by colour.
            far: Whether twice as far.
        """
        return "jumped"
