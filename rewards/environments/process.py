"""The worker's side of a process of environments: starting it, calling it, ending it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import IO, Any

from cohort.actors.process import MARKER, end_tree, start_watcher
from cohort.rewards.environments.base import EnvironmentLoadError

LENGTH = struct.Struct(">Q")
MAX_REPLY = 64 << 20
KILL_TIMEOUT_S = 10.0
EXIT_TICKS, TICK_S = 25, 0.02
BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from cohort.rewards.environments.host import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class ProcessLost(Exception):
    """The process of environments died, or said something that is none of its answers."""


class CallFailed(Exception):
    """An environment raised; the message holds the end of its traceback."""


class HostProcess:
    """One process of environments, and the calls that wait for its answers.

    Attributes:
        episodes: Those that live in it.
        retired: Whether it takes no new episodes, because something in it hangs.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        marker: str,
        watcher: IO[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._marker = marker
        self._watcher = watcher
        self._reader = reader
        self._writer = writer
        self._reading: asyncio.Task[None] | None = None
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._lost: ProcessLost | None = None
        self.episodes: set[str] = set()
        self.retired = False

    @classmethod
    async def start(
        cls, hello: Mapping[str, Any], environment: Mapping[str, str], start_timeout_s: float
    ) -> HostProcess:
        """Start a process and wait until it has loaded the environment's class.

        The kernel ties its life to the thread that calls this.

        Raises:
            EnvironmentLoadError: It is not ready in time, with its last words.
        """
        # Its own mark: what ends it must not end the others of this worker.
        marker = uuid.uuid4().hex
        # Removed by the watcher, whoever ends first.
        stubs = tempfile.mkdtemp(prefix="cohort-modules-")
        watcher = start_watcher(marker, Path(stubs))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, tempfile.TemporaryFile() as words:
            paths = [entry or os.getcwd() for entry in sys.path]
            # -P and the explicit path: it imports what this process imports, and the current folder
            # comes last, so that nothing in it shadows a module.
            here = [] if os.getcwd() in paths else [os.getcwd()]
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", BOOT),
                    *(str(theirs.fileno()), str(os.getpid()), *paths, *here),
                ],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env={**environment, MARKER: marker},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            streams = await asyncio.open_connection(sock=ours)
            self = cls(process, marker, watcher, *streams)
            self._send(json.dumps({**hello, "stubs": stubs}).encode())
            try:
                async with asyncio.timeout(start_timeout_s):
                    reply = json.loads(await self._frame())
            except TimeoutError:
                how = f"was not ready after {start_timeout_s:g} s"
            except (asyncio.IncompleteReadError, ConnectionError, ValueError):
                how = "ended"
            else:
                how = ""
                if isinstance(reply, dict) and isinstance(reply.get("error"), str):
                    self.kill()
                    raise EnvironmentLoadError(reply["error"])
            if how:
                self.kill()
                words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
                said = words.read().decode(errors="replace").strip()
                raise EnvironmentLoadError(
                    f"the process that loads task.environment={hello['path']} {how}: "
                    f"{said or 'it said nothing'}"
                )
        self._reading = asyncio.create_task(self._read())
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can answer calls."""
        return self._lost is None

    async def call(
        self, episode: str, what: str, arguments: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """What an environment answers.

        Raises:
            TimeoutError: It did not answer in time.
            ProcessLost: The process died.
            CallFailed: The environment raised.
        """
        if self._lost is not None:
            raise self._lost
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._send(pickle.dumps((number, episode, what, dict(arguments))))
            async with asyncio.timeout(timeout_s):
                reply = await future
        finally:
            self._waiting.pop(number, None)
        if "failed" in reply:
            raise CallFailed(str(reply["failed"]))
        return reply

    def kill(self) -> None:
        """SIGKILL the process and all that it started, and fail the calls that wait."""
        self._closed(self._reap())

    def _reap(self) -> str:
        """End the process and all below it; says how it ended. May run in any thread."""
        if self._process.returncode is None:
            end_tree(self._process.pid, self._marker)
        try:
            code = self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"did not end within {KILL_TIMEOUT_S:g} s of SIGKILL"
        return (
            f"exited with code {code}"
            if code >= 0
            else f"was killed by {signal.Signals(-code).name}"
        )

    def _closed(self, how: str) -> None:
        self._writer.close()
        self._watcher.close()
        self._lose(ProcessLost(f"the process of environments {how}"))

    def _send(self, body: bytes) -> None:
        self._writer.write(LENGTH.pack(len(body)) + body)

    async def _frame(self) -> bytes:
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if size > MAX_REPLY:
            raise ValueError(f"an answer of {size} bytes")
        return await self._reader.readexactly(size)

    async def _read(self) -> None:
        """Hand answers to the calls that wait for them, until the process ends."""
        try:
            while True:
                reply = json.loads(await self._frame())
                future = self._waiting.get(reply["call"])
                if future is not None and not future.done():
                    future.set_result(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._lose(ProcessLost(f"the process of environments sent a garbled answer: {error}"))
        # Its end of the socket closes a moment before it has ended.
        with contextlib.suppress(ChildProcessError):
            for _ in range(EXIT_TICKS):
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None:
                    break
                await asyncio.sleep(TICK_S)
        self._closed(await asyncio.to_thread(self._reap))

    def _lose(self, error: ProcessLost) -> None:
        self._lost = self._lost or error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost)
