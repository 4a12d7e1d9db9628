"""Starting a program, watching its time, output, memory and processes, and ending it as a whole."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cohort.rewards.usage import ControlGroup, descendants, look

# How often a program that no control group bounds is looked at.
LOOK_S = 0.01
# And one that a group bounds.
GLANCE_S = 0.1
# How long the end of a program may take once it was asked for.
KILL_S = 5.0
# How long output may still come when the program has ended.
REST_S = 1.0

Stopped = Literal["", "time", "output", "memory", "processes", "over"]


@dataclass(frozen=True)
class SandboxLimits:
    """Bounds on one program with all that it starts.

    Attributes:
        seconds: By the clock.
        memory_bytes: Of all its processes together, files in memory included.
        file_bytes: Of one file that it writes, and of its /tmp.
        output_bytes: Of stdout, and of stderr.
        processes: At a time.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 32


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        returncode: None when it was killed.
        stdout: Its output.
        stderr: Its output of errors.
        seconds: That it ran, by the clock.
        stopped: The limit for which it was killed; "over": it was no longer wanted; "" for neither.
    """

    returncode: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    stopped: Stopped = ""


@dataclass(frozen=True)
class Start:
    """A command that waits at a gate until it may go on.

    Attributes:
        command: The program and its arguments.
        gate: A byte written here lets it go on; closed by `supervise`.
        ends_with_gate: The command ends itself and what it started when the gate closes.
        passed: Descriptors that it inherits; closed once it has them.
        user: Its user id; None: this process's.
        folder: Where it starts.
        environment: All of its variables.
        to_bound: The process that the program will come from, known while it waits; its argument is
            the command's process.
    """

    command: Sequence[str]
    gate: int
    ends_with_gate: bool
    passed: Sequence[int]
    user: int | None
    folder: str
    environment: Mapping[str, str]
    to_bound: Callable[[int], int | None]


def in_memory(content: bytes) -> int:
    """A descriptor of an unnamed file with this content, at its beginning."""
    descriptor = os.memfd_create("cohort")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def supervise(
    start: Start,
    stdin: bytes,
    limits: SandboxLimits,
    group: ControlGroup | None,
    over: int | None = None,
) -> ProgramResult:
    """Run a command until it ends, or is killed for exceeding a limit; nothing of it is left.

    Args:
        start: The command.
        stdin: What the program reads.
        limits: On the program.
        group: The control group that bounds it, if there is one.
        over: A descriptor that can be read when the program is no longer wanted.
    """
    began = time.monotonic()
    given = in_memory(stdin)
    gate = start.gate
    try:
        process = subprocess.Popen(
            list(start.command),
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=start.folder,
            env=dict(start.environment),
            pass_fds=list(start.passed),
            start_new_session=True,
            user=start.user,
            group=start.user,
            extra_groups=None if start.user is None else [],
        )
    except BaseException:
        os.close(gate)
        raise
    finally:
        for descriptor in (given, *start.passed):
            os.close(descriptor)
    with process:
        try:
            pid = start.to_bound(process.pid)
            if group is not None and pid is not None:
                group.add(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(gate, b"1")
            stopped, stdout, stderr = _watch(process, began, limits, group, over)
        finally:
            os.close(gate)
            if start.ends_with_gate and not _ended(process.pid, KILL_S):
                _kill_below(process.pid)
            # Also after a normal end. The process is not reaped yet, so the group's id is its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if not stopped and group is not None and group.ran_out():
        stopped = "memory"
    seconds = time.monotonic() - began
    return ProgramResult(None if stopped else process.returncode, stdout, stderr, seconds, stopped)


def _watch(
    process: subprocess.Popen[bytes],
    began: float,
    limits: SandboxLimits,
    group: ControlGroup | None,
    over: int | None,
) -> tuple[Stopped, bytes, bytes]:
    """Until the process has ended and its output is read, or a limit is exceeded."""
    assert process.stdout is not None
    assert process.stderr is not None
    collected = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    bounded = group is not None and group.bounds_memory and group.bounds_processes
    ended, deadline = os.pidfd_open(process.pid), began + limits.seconds
    stopped: Stopped = ""
    with selectors.DefaultSelector() as selector:
        for descriptor in (ended, *collected, *([] if over is None else [over])):
            selector.register(descriptor, selectors.EVENT_READ)
        while (watched := {key.fd for key in selector.get_map().values()} - {over}) and not stopped:
            left = deadline - time.monotonic()
            ready = selector.select(max(0.0, min(left, GLANCE_S if bounded else LOOK_S)))
            running = ended in watched
            if left <= 0:
                # Once it has ended, others that hold its output open do not count against its time.
                stopped = "time" if running else ""
                break
            for key, _ in ready:
                if key.fd == over:
                    stopped = "over"
                    break
                if key.fd == ended:
                    selector.unregister(ended)
                    deadline = min(deadline, time.monotonic() + REST_S)
                    continue
                chunk = os.read(key.fd, 1 << 16)
                collected[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(collected[key.fd]) > limits.output_bytes:
                    stopped = "output"
            if running and not stopped:
                # Not every kernel ends the whole group when its memory runs out.
                stopped = "memory" if group is not None and group.ran_out() else ""
            if running and not bounded and not stopped:
                stopped = _exceeded(process.pid, limits)
    os.close(ended)
    stdout, stderr = (bytes(data[: limits.output_bytes]) for data in collected.values())
    return stopped, stdout, stderr


def _exceeded(pid: int, limits: SandboxLimits) -> Stopped:
    found = look(pid, limits.memory_bytes, limits.processes + HELPERS)
    if found.processes > limits.processes + HELPERS:
        return "processes"
    return "memory" if found.memory_bytes > limits.memory_bytes else ""


# The sandbox's own processes beside the program.
HELPERS = 4


def _kill_below(pid: int) -> None:
    """Kill the group of each process below one that should have done it."""
    for each in descendants(pid, 1000)[1:]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpgid(each), signal.SIGKILL)


def _ended(pid: int, seconds: float) -> bool:
    """Wait until a child ends, without reaping it."""
    descriptor = os.pidfd_open(pid)
    try:
        return readable(descriptor, seconds)
    finally:
        os.close(descriptor)


def readable(descriptor: int, seconds: float) -> bool:
    """Whether a descriptor, of any number, can be read within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
