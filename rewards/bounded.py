"""Calls that a model's answer may make endless: run in a process of their own that can be killed.

`9**9**9**9` keeps Python inside one multiplication for hours, where no signal reaches it. The
process is forked, so it has what this one has loaded, and it is kept from call to call.
"""

from __future__ import annotations

import math
import os
import pickle
import selectors
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

from cohort.rewards.results import error_tail

HEADER = struct.Struct(">Q")
# A process that waits for a core on a busy machine gets so many times as long by the clock.
PATIENCE = 4
TICKS = os.sysconf("SC_CLK_TCK")


class TooMuch(Exception):
    """The call took too much time or memory, or ended its process."""


class Bounded:
    """Calls `function(*arguments)` in a process that is killed after `seconds` of its own CPU time.

    So a score does not depend on what else the machine does. Arguments and results are plain
    values.

    Args:
        function: What is called.

    Raises:
        TooMuch: The call was ended.
        RuntimeError: The function raised; the message has its traceback.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self._pid = 0
        self._owner = 0
        self._to = self._from = -1

    def __call__(self, seconds: float, *arguments: object) -> Any:
        # A fork of the process that made it has no helper of its own.
        if self._owner != os.getpid():
            self._start()
        began, before = time.monotonic(), _cpu_seconds(self._pid)

        def left() -> float:
            by_clock = PATIENCE * seconds - (time.monotonic() - began)
            return max(0.0, min(by_clock, seconds - (_cpu_seconds(self._pid) - before)))

        try:
            _send(self._to, pickle.dumps(arguments))
            raised, value = _receive(self._from, left)
        except (EOFError, BrokenPipeError) as error:
            self.close()
            raise TooMuch("its process died, most likely of too much memory") from error
        except TimeoutError as error:
            self.close()
            raise TooMuch(f"it took over {seconds:g} s") from error
        if raised == "memory":
            raise TooMuch("it took too much memory")
        if raised:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process, if there is one."""
        if self._owner != os.getpid():
            return
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        self._owner = 0

    def _start(self) -> None:
        theirs, self._to = os.pipe()
        self._from, out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._to)
            os.close(self._from)
            _serve(self._function, theirs, out)
        os.close(theirs)
        os.close(out)
        self._owner = os.getpid()


def _serve(function: Callable[..., object], requests: int, replies: int) -> None:
    """The forked process: never returns."""
    # An alarm of the parent must not reach this process.
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        while True:
            arguments = _receive(requests, None)
            try:
                reply = pickle.dumps(("", function(*arguments)))
            except MemoryError:
                reply = pickle.dumps(("memory", None))
            # At a process boundary every error becomes a value.
            except Exception as error:  # noqa: BLE001
                reply = pickle.dumps(("raised", error_tail(error)))
            _send(replies, reply)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    finally:
        os._exit(1)


def _cpu_seconds(pid: int) -> float:
    """Seconds of CPU time that a process has used; infinite once it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / TICKS


def _send(descriptor: int, body: bytes) -> None:
    rest = memoryview(HEADER.pack(len(body)) + body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _receive(descriptor: int, left: Callable[[], float] | None) -> Any:
    """A value; `left` tells how many more seconds to wait for it."""
    (size,) = HEADER.unpack(_exactly(descriptor, HEADER.size, left))
    return pickle.loads(_exactly(descriptor, size, left))


def _exactly(descriptor: int, size: int, left: Callable[[], float] | None) -> bytes:
    data = bytearray()
    # Not select(2), which fails where a process has a thousand files open.
    with selectors.PollSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(data) < size:
            if not selector.select(None if left is None else left()):
                if left is not None and left() > 0:
                    continue
                raise TimeoutError
            chunk = os.read(descriptor, min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
    return bytes(data)
