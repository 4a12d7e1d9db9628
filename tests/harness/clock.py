"""An event loop whose time is virtual: it jumps to the next timer when there is nothing to do.

A wait of ten minutes takes no time, the order of events does not depend on the machine's load, and
a program in which everything waits for ever ends with Deadlock at once instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
# How long real work in other threads, and signals on their way, may take.
PATIENCE_S = 30.0
START_S = 1000.0
MAX_TURNS = 100_000
# More than any test waits for: what polls for ever ends, too.
MAX_S = 50_000.0


class Deadlock(Exception):
    """Every task waits, and no timer will wake any of them."""


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop
    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            self.turns += 1
            if self.turns > MAX_TURNS:
                raise Deadlock(f"{MAX_TURNS} turns of the loop in which no time has passed")
            return ready
        self.turns = 0
        if self.loop.threads:
            # A thread works on something real: its time is not ours to skip.
            return super().select(PATIENCE_S)
        if timeout is None:
            if ready := super().select(self.loop.idle_s):
                return ready
            raise Deadlock("everything waits, and no timer is set")
        self.loop.now += timeout
        if self.loop.now > START_S + MAX_S:
            raise Deadlock(f"not done after {MAX_S:g} virtual seconds")
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """now: the virtual time, seconds. threads: calls that run in other threads at the moment.

    idle_s: how long to wait for the outside world (a signal) before it is a Deadlock.
    """

    def __init__(self) -> None:
        self.now = START_S
        self.threads = 0
        self.idle_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)

        def done(_: Any) -> None:
            self.threads -= 1

        future.add_done_callback(done)
        return future


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program in virtual time, `time.monotonic` included: `asyncio.run` for tests that wait.

    Raises Deadlock when it can never end.
    """
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    patch = pytest.MonkeyPatch()
    patch.setattr(time, "monotonic", loop.time)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            # What is cancelled may begin something new on its way out.
            for _ in range(5):
                for task in (left := asyncio.all_tasks(loop)):
                    task.cancel()
                if left:
                    loop.run_until_complete(asyncio.wait(left, timeout=0.01))
        finally:
            loop.threads += 1  # its shutdown waits in a thread of its own
            loop.run_until_complete(loop.shutdown_default_executor())
            patch.undo()
            asyncio.set_event_loop(None)
            loop.close()
