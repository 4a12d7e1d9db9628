"""The actor's side of a reward child: starting it, calling it under a deadline, ending it."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from cohort.actors.process import MARKER, end_tree
from cohort.rewards.child import CALL_BYTES, receive, send
from cohort.rewards.loading import RewardLoadError

KILL_TIMEOUT_S = 10.0
MAX_REPLY = 64 << 20
BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from cohort.rewards.child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Child:
    """One child process and the socket to it.

    hello: what it is told first, see `cohort.rewards.child`. environment: all of its variables; its
    MARKER is how what it leaves behind is found. per_completion: for each function, whether it says
    that it judges each completion by itself.

    Raises RewardLoadError when it is not ready within `start_timeout_s`, with its last words.
    """

    def __init__(
        self, hello: Mapping[str, Any], environment: Mapping[str, str], start_timeout_s: float
    ) -> None:
        deadline = time.monotonic() + start_timeout_s
        self._marker = environment[MARKER]
        self._socket, theirs = socket.socketpair()
        # What the child says before it is ready explains why it never was.
        with theirs, tempfile.TemporaryFile() as words:
            paths = [entry or os.getcwd() for entry in sys.path]
            # -P and the explicit path: the child imports what this process imports, and the
            # current folder comes last, so that nothing in it shadows a module.
            here = [] if os.getcwd() in paths else [os.getcwd()]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", BOOT),
                    *(str(theirs.fileno()), str(os.getpid()), *paths, *here),
                ],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            try:
                send(self._socket, json.dumps(hello).encode(), deadline)
                reply = _read(receive(self._socket, deadline, self.alive, MAX_REPLY))
                self.per_completion = _flags(reply, len(hello["functions"]))
            except (EOFError, OSError, ValueError) as error:
                ending = self.kill()
                words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
                said = words.read().decode(errors="replace").strip()
                paths_shown = ", ".join(function["path"] for function in hello["functions"])
                how = ending
                if isinstance(error, RewardLoadError):
                    raise
                if isinstance(error, TimeoutError):
                    how = f"was not ready after {start_timeout_s:g} s"
                elif isinstance(error, ValueError):
                    how = f"does not speak as it should ({error})"
                raise RewardLoadError(
                    f"the process that loads {paths_shown} {how}: {said or 'it said nothing'}"
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs. It is not reaped, so its id stays ours."""
        if self._process.returncode is not None:
            return False
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return ended is None

    def is_ready(self) -> bool:
        """Whether it runs and has said nothing since its last answer."""
        return self.alive() and not select.select([self._socket], [], [], 0)[0]

    def call(self, index: int, payload: bytes, timeout_s: float) -> dict[str, Any]:
        """What function `index` said about a pickled group; see `cohort.rewards.child`.

        Raises TimeoutError, EOFError and OSError for a child that does not answer, ValueError for
        an answer that is not ours.
        """
        deadline = time.monotonic() + timeout_s
        number = secrets.token_bytes(CALL_BYTES)
        send(self._socket, struct.pack(">I", index) + number + payload, deadline)
        reply = _read(receive(self._socket, deadline, self.alive, MAX_REPLY))
        if reply.get("call") != number.hex():
            raise ValueError("a garbled reply: to another call")
        if "failed" in reply and not isinstance(reply["failed"], str):
            raise ValueError("a garbled reply: it failed without words")
        return reply

    def kill(self) -> str:
        """SIGKILL the child and all that it started, and wait for it; says how the child ended."""
        if self._process.returncode is None:
            end_tree(self.pid, self._marker)
        self._socket.close()
        try:
            code = self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"did not end within {KILL_TIMEOUT_S:g} s of SIGKILL"
        if code >= 0:
            return f"exited with code {code}"
        return f"was killed by {signal.Signals(-code).name}"


def _read(frame: bytes) -> dict[str, Any]:
    """A frame as a table; raises ValueError for anything else, however it was forged."""
    try:
        reply = json.loads(frame)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"a garbled reply: {type(error).__name__}") from None
    if not isinstance(reply, dict):
        raise ValueError("a garbled reply: not a table")
    return reply


def _flags(reply: Mapping[str, Any], count: int) -> tuple[bool, ...]:
    """What a child that is ready says; raises RewardLoadError when it could not load something."""
    if isinstance(reply.get("error"), str):
        raise RewardLoadError(reply["error"])
    flags = reply.get("per_completion")
    if not isinstance(flags, list) or len(flags) != count:
        raise ValueError("a garbled reply: it does not say what was loaded")
    return tuple(flag is True for flag in flags)
