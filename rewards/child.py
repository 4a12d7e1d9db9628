"""The process in which reward functions run: loads them once, calls them on its main thread.

It talks to its reward worker over one socket. Frames are a length (8 bytes, big-endian) and a body.
In: what to load as JSON, then for each call the function's index (4 bytes), the call's own number
(16 random bytes) and a pickled Group. Out: JSON only, because the parent must not unpickle what
foreign code may forge; an answer repeats its call's number, so that no other is mistaken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cohort.actors.plain import JsonObject

TICK_S = 0.2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CALL_BYTES = 16


def send(connection: socket.socket, body: bytes, deadline: float | None = None) -> None:
    """Write one frame.

    Args:
        connection: The socket.
        body: The content of the frame.
        deadline: On the clock of time.monotonic; None: none.

    Raises:
        TimeoutError: The deadline has passed.
        OSError: The connection is broken.
    """
    rest = memoryview(struct.pack(">Q", len(body)) + body)
    while rest:
        connection.settimeout(_left(deadline))
        rest = rest[connection.send(rest) :]


def receive(
    connection: socket.socket,
    deadline: float | None = None,
    alive: Callable[[], bool] | None = None,
    limit: int = 1 << 40,
) -> bytes:
    """Read one frame.

    Args:
        connection: The socket.
        deadline: On the clock of time.monotonic; None: none.
        alive: Whether the other side runs, asked every TICK_S: after its death, a process that it
            forked may hold its end of the socket open.
        limit: Bytes that a frame may have.

    Raises:
        TimeoutError: The deadline has passed.
        EOFError: The other side is gone, or announces more than `limit` bytes.
    """
    (size,) = struct.unpack(">Q", _exactly(connection, 8, deadline, alive))
    if size > limit:
        raise EOFError(f"a frame of {size} bytes")
    return _exactly(connection, size, deadline, alive)


def _exactly(
    connection: socket.socket,
    size: int,
    deadline: float | None,
    alive: Callable[[], bool] | None,
) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = _left(deadline)
        connection.settimeout(left if alive is None else min(TICK_S, left or TICK_S))
        try:
            chunk = connection.recv(min(size - len(data), 1 << 20))
        except TimeoutError:
            _left(deadline)
            if alive is not None and not alive():
                raise EOFError("the process ended") from None
            continue
        if not chunk:
            raise EOFError("the connection closed")
        data += chunk
    return bytes(data)


def _left(deadline: float | None) -> float | None:
    """Seconds until the deadline, None without one. Raises TimeoutError when it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return left


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL (Linux).

    It also becomes the parent of what its own children leave behind, so that all of it is found.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The parent may have died before the call above.
    if os.getppid() != parent:
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serve a reward worker until its socket closes.

    Args:
        descriptor: Of the socket.
        parent: The worker's process.
    """
    die_with_parent(parent)
    # SIGALRM code must work here whatever the actor's process blocks.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    # The death signal is set: only now the imports that take time.
    from cohort.rewards.adapters import load_reward
    from cohort.rewards.base import RewardLoadError, is_per_completion, score_group
    from cohort.rewards.result_json import to_json
    from cohort.rewards.results import error_tail

    with contextlib.suppress(EOFError), asyncio.Runner() as runner:
        hello = json.loads(receive(connection))
        bound_memory(hello["memory_bytes"])
        loaded = []
        try:
            for spec in hello["functions"]:
                function = load_reward(
                    spec["path"], spec["kind"], spec["options"], Path(hello["stubs"])
                )
                loaded.append((function, spec["name"], spec["columns"]))
        except RewardLoadError as error:
            _reply(connection, {"error": str(error)})
            return
        alone = [is_per_completion(function) for function, _, _ in loaded]
        _reply(connection, {"per_completion": alone})
        discard_output()
        while True:
            frame = memoryview(receive(connection))
            (index,) = struct.unpack(">I", frame[:4])
            call = {"call": frame[4 : 4 + CALL_BYTES].hex()}
            function, name, columns = loaded[index]
            try:
                group = pickle.loads(frame[4 + CALL_BYTES :])
            except Exception as error:  # noqa: BLE001  columns may hold objects of foreign code
                failed = f"cannot unpickle the group: {error_tail(error)}"
                _reply(connection, call | {"failed": failed})
                continue
            result = score_group(function, name, group, runner.run, columns, hello["max_steps"])
            # An alarm that the function left behind must not hit the next group.
            signal.setitimer(signal.ITIMER_REAL, 0)
            _reply(connection, call | to_json(result))


def bound_memory(limit: int | None) -> None:
    """Make allocations beyond `limit` bytes fail, here and in every process started from here."""
    if limit is not None:
        # Not RLIMIT_AS: libraries reserve far more addresses than they ever use.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reply(connection: socket.socket, body: JsonObject) -> None:
    send(connection, json.dumps(body).encode())


def discard_output() -> None:
    """Send what reward functions print to nowhere: it has no bound."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
