"""Environments that are slow, name things as we do, or return more than they should."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path
from typing import Any

from cohort.rewards.environments.base import EnvironmentFailed, Reply, Step


class Slow:
    """Takes its time for each answer."""

    def reset(self, row: Any) -> None:
        self.seconds = row["takes"]

    def step(self, _: Reply) -> Step:
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

    def reset(self, function: str = "", seed: int = 0, **_: Any) -> None:
        self.function, self.seed = function, seed

    def differentiate(self, function: str) -> str:
        """Differentiate.

        Args:
            function: What.
        """
        return f"the derivative of {function}"


class Diary:
    """Writes down what it was asked for, and raises where its row says so."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def _note(self, word: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{word} ")
        if word == self._raises:
            raise RuntimeError("not today")

    def reset(self, raises: str) -> None:
        self._raises = raises
        self._note("reset")

    def fails(self) -> str:
        """Fail the episode."""
        raise EnvironmentFailed("the service is down")

    def get_reward(self) -> float:
        self._note("get_reward")
        return 1.0

    def close(self) -> None:
        self._note("close")


class Metrics:
    """Returns the metrics of its row; it has a tool that it never hears of."""

    def reset(self, row: Any) -> None:
        self._metrics = row["metrics"]

    def step(self, reply: Reply) -> Step:
        return Step(reply.tool_calls[0].id, metrics=self._metrics)


class Panic(BaseException):
    """No Exception, as those of libraries in Rust."""


RAISED = {
    "panic": Panic,
    "interrupt": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError,
    "stop": StopIteration,
}


class RaisingTools:
    """Tools that raise what few handlers take."""

    def raises(self, what: str) -> str:
        """Raise it.

        Args:
            what: One of RAISED.
        """
        raise RAISED[what]("dear me")

    async def raises_async(self, what: str) -> str:
        """Raise it in a coroutine.

        Args:
            what: One of RAISED.
        """
        raise RAISED[what]("dear me")


class OddSteps:
    """Raises, or returns, in `step` what its row says."""

    def reset(self, row: Any) -> None:
        self._how = row["how"]

    def step(self, _: Reply) -> Any:
        if self._how in RAISED:
            raise RAISED[self._how]("dear me")
        text, many = "x" * 20_000, 10**7
        messages = {
            "too many": [{"role": "user", "content": "x"}] * 1001,
            "too long": [{"role": "user", "content": "\x00" * 20_000}] * 600,
            "names": [{"role": "user", "name": "x" * many, "tool_call_id": b"ab", "content": text}],
        }
        numbers = {"large reward": Step(reward=-1.1e30), "large metric": Step(metrics={"m": 1e308})}
        if self._how in numbers:
            return numbers[self._how]
        failure = "x" * many if self._how == "fails" else None
        how = messages.get(self._how, ())
        return Step(how, reward=1.0, done=self._how in ("names", "is fine"), failure=failure)


class LastReward:
    """Its last word is its row's."""

    def reset(self, reward: float) -> None:
        self._reward = reward

    def nothing(self) -> None:
        """Do nothing."""

    def get_reward(self) -> float:
        return self._reward


class NoReward:
    """Has a tool, and nothing to say of what was done with it."""

    def nothing(self) -> None:
        """Do nothing."""


class NoReset:
    """Answers, and cannot begin."""

    def step(self, _: Reply) -> Step:
        return Step(done=True)


class AskedAtTheEnd(Slow):
    """Gives rewards in its steps, and one more at the end."""

    def get_reward(self) -> float:
        return 10.0


def make_slow() -> Slow:
    return Slow()


def make_tools() -> SlowTool:
    return SlowTool()


def make_no_reset() -> NoReset:
    return NoReset()


partly = functools.partial(SlowTool)
