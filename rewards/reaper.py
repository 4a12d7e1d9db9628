"""Runs a program and, when it ends, everything that it has started: `reaper.py CONTROL COMMAND...`.

Alone, without this package: a process of its own for each program. A process that a program started
and left (a daemon, a second session) becomes a child of this one, so none can be lost. CONTROL is a
descriptor: the program starts when a byte arrives there, and is killed when it closes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import selectors
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def main(control: int, command: list[str]) -> None:
    """Run a command and reap all that it starts.

    Args:
        control: The descriptor CONTROL.
        command: The program and its arguments.
    """
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("the kernel lets no process take in orphans")
    if not os.read(control, 1):
        return
    program = os.fork()
    if program == 0:
        os.setsid()
        os.execv(command[0], command)
    # Nothing of the program's may wait for an end of this process.
    ended = os.pidfd_open(program)
    with selectors.PollSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        selector.register(control, selectors.EVENT_READ)
        selector.select()
    # All of its group at one moment: a program that forks without end is not outrun one by one. It
    # is not reaped yet, so the group's id is its own.
    os.killpg(program, signal.SIGKILL)
    status = 0
    while True:
        try:
            pid, found = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == program:
            status = found
        if pid == 0:
            for child in children():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def children() -> list[int]:
    """Processes whose parent is this one; they stay until it has waited for them."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid():
            found.append(int(entry))
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
