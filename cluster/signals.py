"""SIGINT, SIGTERM and SIGHUP: the first one asks a command to stop, a second one ends it.

What "stop" means changes during a run: before anything exists, leave; during the start, undo it;
during training, save. Python's own handlers are used rather than the event loop's, because they
also work while the loop is blocked for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import TypeVar

from cohort.actors.process import SUPERVISED

T = TypeVar("T")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the command to stop. Like KeyboardInterrupt, it is not an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """The handlers of one command; a context manager that restores those it found.

    Attributes:
        caught: The number of the first signal.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._action: Callable[[int], object] = self._raise
        self._before: dict[int, signal._HANDLER] = {}
        self._process = os.getpid()
        self._supervised = SUPERVISED in os.environ

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored stays so: `nohup` ignores SIGHUP.
            self._before = {
                number: signal.getsignal(number)
                for number in STOPPING
                if signal.getsignal(number) is not signal.SIG_IGN
            }
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Set the handlers; again after a library has set its own, as Ray does."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # A forked child, of a pool that loads data for example, inherits its parent's handlers.
        if os.getpid() != self._process or (self.caught is not None and not self._supervised):
            os._exit(128 + number)
        if self.caught is not None:
            # Whoever stops a job may signal all of its processes, and its supervisor passes on
            # what it gets: a second signal is meant for the supervisor, which kills this process.
            return
        self.caught = number
        self._action(number)

    def _raise(self, number: int) -> None:
        raise Stopped(number)

    def check(self) -> None:
        """Raise Stopped if a signal's exception was swallowed by a library's bare `except:`."""
        if self.caught is not None:
            raise Stopped(self.caught)

    def then(self, action: Callable[[], object]) -> None:
        """Call `action` in the running event loop at the first signal, or now if it has come."""
        loop = asyncio.get_running_loop()
        self._action = lambda _: loop.call_soon_threadsafe(action)
        if self.caught is not None:
            action()

    async def cancel(self, work: Coroutine[object, object, T]) -> T:
        """The result of `work`, which the first signal cancels until it chooses another action.

        Raises Stopped when a signal ended it so.
        """
        task = asyncio.ensure_future(work)
        self.then(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            self.check()
            raise

    def name(self) -> str:
        """The name of the signal that was caught."""
        return "" if self.caught is None else signal.Signals(self.caught).name


def leave_at_once(number: int, _: FrameType | None) -> None:
    """The handler before and after a run, when there is nothing to end."""
    os.write(2, f"{signal.Signals(number).name}: leaving\n".encode())
    os._exit(128 + number)


def leave_at_once_on_signals() -> None:
    """Let a signal end the `cohort` command without a traceback while its imports run."""
    if Path(sys.argv[0]).stem != "cohort":
        return
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave_at_once)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[object, object, T]) -> T | None:
    """The result of `work`, or None when `stop` is set first; `work` is cancelled then."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stopping.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task, stopping})
