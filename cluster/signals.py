"""SIGINT, SIGTERM and SIGHUP: the first one asks a command to stop, a second one ends it.

What "stop" means changes while a run goes on: before anything exists, leave; during the start, undo
it; during training, save. Python's own handlers are used, and not those of the event loop: they
also work while the loop is busy with something that does not return for seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the command to stop. Like KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """The handlers of one command; a context manager that puts back those it found.

    caught: the number of the first signal.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._action: Callable[[int], Any] = self._raise
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Set the handlers, again after a library has set its own (Ray does)."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked child (of a pool that loads data, say) has its parent's handlers.
            os._exit(128 + number)
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = number
        self._action(number)

    def _raise(self, number: int) -> None:
        raise Stopped(number)

    def check(self) -> None:
        """Raise Stopped if a signal came whose exception was lost (a library's bare `except:`)."""
        if self.caught is not None:
            raise Stopped(self.caught)

    def then(self, action: Callable[[], Any]) -> None:
        """From now on the first signal has `action` called in the running event loop.

        Called now, if the signal has come already.
        """
        loop = asyncio.get_running_loop()
        self._action = lambda _: loop.call_soon_threadsafe(action)
        if self.caught is not None:
            action()

    async def cancel(self, work: Coroutine[Any, Any, T]) -> T:
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
    """The handler before and after a run: nothing exists that would have to be ended."""
    os.write(2, f"{signal.Signals(number).name}: leaving\n".encode())
    os._exit(128 + number)


def leave_at_once_on_signals() -> None:
    """Let a signal end this process quietly, without a traceback, if it is the `cohort` command.

    For the imports that take the first seconds of a command.
    """
    if Path(sys.argv[0]).stem != "cohort":
        return
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave_at_once)
