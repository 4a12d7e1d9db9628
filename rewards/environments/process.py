"""The worker's side of a process of environments: starting it, calling it, ending it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import IO

from cohort.actors.plain import JsonObject
from cohort.actors.process import MARKER, end_tree, start_watcher
from cohort.rewards.booting import boot, ending, last_output
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.frames import MAX_REPLY, read_frame, write_frame
from cohort.rewards.results import error_tail

EXIT_TICKS, TICK_S = 25, 0.02


class ProcessLost(Exception):
    """The process of environments died, or sent something that is not an answer."""


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
        self._waiting: dict[int, asyncio.Future[JsonObject]] = {}
        self._lost: ProcessLost | None = None
        self.episodes: set[str] = set()
        self.retired = False

    @classmethod
    async def start(
        cls, hello: Mapping[str, object], environment: Mapping[str, str], start_timeout_s: float
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
        with tempfile.TemporaryFile() as printed:
            variables = {**environment, MARKER: marker}
            process = boot("cohort.rewards.environments.host", theirs, variables, printed)
            streams = await asyncio.open_connection(sock=ours)
            self = cls(process, marker, watcher, *streams)
            write_frame(self._writer, json.dumps({**hello, "stubs": stubs}).encode())
            try:
                async with asyncio.timeout(start_timeout_s):
                    reply = json.loads(await read_frame(self._reader, MAX_REPLY))
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
                raise EnvironmentLoadError(
                    f"the process that loads task.environment={hello['path']} {how}: "
                    f"{last_output(printed)}"
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
        self, episode: str, what: str, arguments: Mapping[str, object], timeout_s: float | None
    ) -> JsonObject:
        """What an environment answers.

        Args:
            episode: The id of its episode.
            what: What it is asked to do.
            arguments: By name.
            timeout_s: Longest wait; None: the caller knows when to give up.

        Raises:
            TimeoutError: It did not answer in time.
            ProcessLost: The process died.
            CallFailed: The environment raised, or the row cannot be handed to it.
        """
        if self._lost is not None:
            raise self._lost
        try:
            payload = pickle.dumps(dict(arguments))
        # Columns may hold objects of foreign code, and anything may be nested too deep.
        except Exception as error:
            raise CallFailed(f"cannot pickle the row: {error_tail(error, 300)}") from error
        number = next(self._numbers)
        future: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            # It closes with its process, a moment before `_lose` says so to this call, too.
            if not self._writer.is_closing():
                write_frame(self._writer, pickle.dumps((number, episode, what, payload)))
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
        return ending(self._process)

    def _closed(self, how: str) -> None:
        self._writer.close()
        self._watcher.close()
        self._lose(ProcessLost(f"the process of environments {how}"))

    async def _read(self) -> None:
        """Hand answers to the calls that wait for them, until the process ends."""
        try:
            while True:
                reply = json.loads(await read_frame(self._reader, MAX_REPLY))
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
