"""The reward worker's side of a reward child: start it, call it with a deadline, end it."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import struct
import tempfile
import time
from collections.abc import Mapping

from cohort.actors.plain import JsonObject
from cohort.actors.process import MARKER, end_tree
from cohort.rewards.booting import boot, ending, last_output
from cohort.rewards.child import CALL_BYTES, receive, send
from cohort.rewards.loading import RewardLoadError

MAX_REPLY = 64 << 20


class Child:
    """One child process and the socket to it.

    Args:
        hello: The first frame to it, see `cohort.rewards.child`.
        environment: All of its variables; what it leaves behind is found by its MARKER.
        start_timeout_s: Seconds within which it is ready.

    Attributes:
        per_completion: For each function, whether it declares that it scores each completion by
            itself.

    Raises:
        RewardLoadError: It is not ready in time; the message ends with its last output.
    """

    def __init__(
        self, hello: JsonObject, environment: Mapping[str, str], start_timeout_s: float
    ) -> None:
        deadline = time.monotonic() + start_timeout_s
        self._marker = environment[MARKER]
        self._socket, theirs = socket.socketpair()
        # What the child prints before it is ready explains why it never was.
        with tempfile.TemporaryFile() as printed:
            self._process = boot("cohort.rewards.child", theirs, environment, printed)
            try:
                send(self._socket, json.dumps(hello).encode(), deadline)
                reply = _read(receive(self._socket, deadline, self.alive, MAX_REPLY))
                self.per_completion = _flags(reply, len(hello["functions"]))
            except (EOFError, OSError, ValueError) as error:
                how = self.kill()
                paths_shown = ", ".join(function["path"] for function in hello["functions"])
                if isinstance(error, RewardLoadError):
                    raise
                if isinstance(error, TimeoutError):
                    how = f"was not ready after {start_timeout_s:g} s"
                elif isinstance(error, ValueError):
                    how = f"sent an invalid reply ({error})"
                raise RewardLoadError(
                    f"the process that loads {paths_shown} {how}: {last_output(printed)}"
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
        """Whether it runs and has sent nothing since its last answer."""
        with selectors.PollSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return self.alive() and not selector.select(0)

    def call(self, index: int, payload: bytes, timeout_s: float) -> JsonObject:
        """Call a function; see `cohort.rewards.child`.

        Args:
            index: Of the function.
            payload: A pickled group.
            timeout_s: Seconds.

        Returns:
            The child's reply to this call, not checked further.

        Raises:
            TimeoutError: No answer in time.
            EOFError: The child is gone.
            OSError: The connection is broken.
            ValueError: A forged reply.
        """
        deadline = time.monotonic() + timeout_s
        number = secrets.token_bytes(CALL_BYTES)
        send(self._socket, struct.pack(">I", index) + number + payload, deadline)
        reply = _read(receive(self._socket, deadline, self.alive, MAX_REPLY))
        if reply.get("call") != number.hex():
            raise ValueError("a garbled reply: to another call")
        if "failed" in reply and not isinstance(reply["failed"], str):
            raise ValueError("a garbled reply: it failed without a message")
        return reply

    def kill(self) -> str:
        """SIGKILL the child and all that it started, and wait for it.

        Returns:
            How the child ended, in words.
        """
        if self._process.returncode is None:
            end_tree(self.pid, self._marker)
        self._socket.close()
        return ending(self._process)


def _read(frame: bytes) -> JsonObject:
    """A frame as a table; raises ValueError for anything else, however it was forged."""
    try:
        reply = json.loads(frame)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"a garbled reply: {type(error).__name__}") from None
    if not isinstance(reply, dict):
        raise ValueError("a garbled reply: not a table")
    return reply


def _flags(reply: Mapping[str, object], count: int) -> tuple[bool, ...]:
    """The `per_completion` of each function; raises RewardLoadError for one that did not load."""
    if isinstance(reply.get("error"), str):
        raise RewardLoadError(reply["error"])
    flags = reply.get("per_completion")
    if not isinstance(flags, list) or len(flags) != count:
        raise ValueError("a garbled reply: what was loaded is missing")
    return tuple(flag is True for flag in flags)
