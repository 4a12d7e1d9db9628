"""Starting the processes that run code of others, and saying how they ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

KILL_TIMEOUT_S = 10.0
# Of what a process has printed when it could not start.
OUTPUT_BYTES = 2000
BOOT = (
    "import importlib, sys; sys.path[:] = sys.argv[4:]; "
    "importlib.import_module(sys.argv[1]).main(int(sys.argv[2]), int(sys.argv[3]))"
)


def boot(
    module: str, theirs: socket.socket, environment: Mapping[str, str], printed: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a process that calls `main(descriptor, parent)` of a module.

    It imports what this process imports.

    Args:
        module: Its dotted name.
        theirs: The process's end of a socket; closed here.
        environment: All of its variables.
        printed: Takes its output.
    """
    paths = [entry or os.getcwd() for entry in sys.path]
    # -P and the explicit path: the current folder comes last, so that nothing in it shadows a
    # module.
    here = [] if os.getcwd() in paths else [os.getcwd()]
    with theirs:
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-c", BOOT, module),
                *(str(theirs.fileno()), str(os.getpid()), *paths, *here),
            ],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            env=dict(environment),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )


def last_output(printed: IO[bytes]) -> str:
    """The end of what a process has printed."""
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - OUTPUT_BYTES))
    return printed.read().decode(errors="replace").strip() or "without any output"


def ending(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process that was killed.

    Returns:
        How it ended, in words.
    """
    try:
        code = process.wait(KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"did not end within {KILL_TIMEOUT_S:g} s of SIGKILL"
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}"
