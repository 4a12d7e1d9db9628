"""A sandbox as tools: `task.environment: sandbox`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO

from cohort.rewards.environments.base import EnvironmentFailed
from cohort.rewards.environments.tools import ToolError
from cohort.rewards.sandbox import ProgramResult, Sandbox, SandboxError, SandboxLimits

MIB = 1 << 20
# The working folder: the sandbox's /tmp, which is bounded and counts as memory.
FOLDER = "/tmp"
# Written behind an archive that is whole.
KEPT = b"kept"
# Unpacks descriptor $1 into the folder (empty: there is nothing yet), runs the rest, and packs the
# folder into descriptor $2. What the program has left running ends first: it must not write while
# the folder is read.
PACKED = f"""
cd {FOLDER} || exit 125
from=$1 to=$2
shift 2
if [ -n "$from" ]; then tar -xf - <&"$from" || exit 125; fi
eval '"$@"' ${{from:+"$from<&-"}} "$to<&-"
code=$?
kill -9 -1 2>/dev/null
chmod -R u+rwX . 2>/dev/null
tar -cSf - . 1>&"$to" 2>/dev/null && printf '%s' {KEPT.decode()} 1>&"$to" 2>/dev/null
exit "$code"
"""
WRITE = 'mkdir -p -- "$(dirname -- "$1")" && cat /work/text > "$1"'
# Linux takes 128 KiB at most.
LONGEST_ARGUMENT = 1 << 14
# How often one that waits for a place looks whether its episode has ended.
GLANCE_S = 0.1
UNDONE = "the files are as they were before the call"


@dataclass(frozen=True)
class Called:
    """How a program in the folder ended.

    Attributes:
        returncode: None when it was stopped.
        stdout: What it printed.
        stderr: Its output of errors.
        stopped: Why it was stopped, and nothing of it is left; "": it was not.
    """

    returncode: int | None
    stdout: str
    stderr: str
    stopped: str = ""


class SandboxTools:
    """Tools that run what the model writes: `python`, `bash`, and files.

    Each call is a program in a sandbox of its own (see `cohort.rewards.sandbox`): no network, no
    file of this machine, bounds on time, memory, processes and output. The working folder lives as
    long as the episode: each call finds the files that the calls before have left. A call that is
    stopped for a limit leaves no trace. Processes end with their call.

    Inherit from it for a `reset` and a `get_reward`, which may use `_run`; `bash = None` in it
    takes a tool away. A column `files` (name -> text) is put into the folder at the beginning.

    Args:
        seconds: For one call.
        memory_mb: MiB for one call, all processes and files together.
        folder_mb: MiB of the folder, packed; and of each file.
        processes: Of one call, at a time.
        at_once: Calls that run at one time in a process of environments.
        wait_s: For one of these places; then the episode has failed. Together with `seconds` below
            half of `environments.step_timeout_s`.

    Raises:
        SandboxError: There is no bubblewrap here, or it is not allowed to work.

    Example:
        task.environment: sandbox
        task.environment_options: {seconds: 10, memory_mb: 512}
    """

    def __init__(
        self,
        seconds: float = 10.0,
        memory_mb: int = 512,
        folder_mb: int = 16,
        processes: int = 32,
        at_once: int = 4,
        wait_s: float = 15.0,
    ) -> None:
        numbers = {
            "seconds": seconds,
            "memory_mb": memory_mb,
            "folder_mb": folder_mb,
            "processes": processes,
            "at_once": at_once,
        }
        for name, value in numbers.items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self._sandbox = _sandbox(
            SandboxLimits(
                seconds=seconds,
                memory_bytes=memory_mb * MIB,
                file_bytes=folder_mb * MIB,
                processes=processes,
            )
        )
        self._places, self._wait_s = _places(at_once), wait_s
        self._kept: IO[bytes] | None = None
        self._one = threading.Lock()
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._ended = False

    def reset(self, files: Mapping[str, str] | None = None) -> None:
        """Put the row's files into the folder."""
        for name, text in (files or {}).items():
            self.write_file(name, text)

    def python(self, code: str) -> str:
        """Run a Python program. Variables are not kept from call to call; files are.

        Args:
            code: The program. What it prints is the answer.
        """
        command = ["env", f"PYTHONPATH={FOLDER}", "python3", "-B", "/work/main.py"]
        return _said(self._run(command, {"main.py": code}))

    def bash(self, command: str) -> str:
        """Run a bash script. Processes end with the call; files are kept from call to call.

        Args:
            command: The script. What it prints is the answer.
        """
        return _said(self._run(["bash", "/work/main.sh"], {"main.sh": command}))

    def read_file(self, path: str) -> str:
        """Read a text file.

        Args:
            path: Of the file, from the working folder.
        """
        return _done(self._run(["cat", "--", path]))

    def write_file(self, path: str, text: str) -> str:
        """Write a text file, and the folders that lead to it.

        Args:
            path: Of the file, from the working folder.
            text: All that it is to hold.
        """
        command = ["bash", "-c", WRITE, "bash", path]
        _done(self._run(command, {"text": text}))
        return f"{len(text)} characters written"

    def list_files(self, path: str = ".") -> str:
        """List the files in a folder.

        Args:
            path: Of the folder, from the working folder.
        """
        return _done(self._run(["ls", "-lAp", "--", path]))

    def close(self) -> None:
        """End what runs, and drop the folder."""
        self._ended = True
        os.eventfd_write(self._over, 1)
        with self._one:
            os.close(self._over)
            if self._kept is not None:
                self._kept.close()

    def _run(
        self, command: Sequence[str], files: Mapping[str, str] | None = None, stdin: str = ""
    ) -> Called:
        """Run a command in the episode's folder.

        Args:
            command: The program and its arguments.
            files: Name -> text, for this command only: read-only in /work.
            stdin: What the program reads.

        Raises:
            ToolError: An argument is too long.
            EnvironmentFailed: The sandbox, not the program, failed.
        """
        if max(map(len, command)) > LONGEST_ARGUMENT:
            raise ToolError(f"an argument is longer than {LONGEST_ARGUMENT} characters")
        # What no argument can hold.
        command = [word.replace("\0", "").encode(errors="replace").decode() for word in command]
        with self._one, self._place(), contextlib.ExitStack() as stack:
            packed = stack.enter_context(tempfile.TemporaryFile(prefix="cohort-folder-"))
            outcome = self._packed(command, files or {}, stdin, packed)
            stopped = self._why(outcome)
            if not stopped and not _whole(packed):
                limit = self._sandbox.limits.file_bytes // MIB
                stopped = (
                    f"the files cannot be kept: there are more than {limit} MiB of them, or the "
                    "program has ended the shell that was to keep them"
                )
            if not stopped:
                stack.pop_all()
                if self._kept is not None:
                    self._kept.close()
                self._kept = packed
        stdout, stderr = (
            data.decode(errors="replace") for data in (outcome.stdout, outcome.stderr)
        )
        return Called(None if stopped else outcome.returncode, stdout, stderr, stopped)

    def _packed(
        self, command: Sequence[str], files: Mapping[str, str], stdin: str, packed: IO[bytes]
    ) -> ProgramResult:
        to = os.dup(packed.fileno())
        passed = [to]
        if self._kept is not None:
            # Opened anew: from its beginning, and not to be written.
            passed.append(os.open(f"/proc/self/fd/{self._kept.fileno()}", os.O_RDONLY))
        came_from = str(passed[1]) if self._kept is not None else ""
        wrapped = ["bash", "-c", PACKED, "bash", came_from, str(to), *command]
        try:
            return self._sandbox.run(wrapped, files, stdin, passed, self._over)
        except (SandboxError, OSError) as error:
            raise EnvironmentFailed(f"the sandbox failed: {error}") from error

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for programs that run."""
        give_up = time.monotonic() + self._wait_s
        while not (free := self._places.acquire(timeout=GLANCE_S)) and not self._ended:
            if time.monotonic() > give_up:
                raise EnvironmentFailed(
                    f"no place for a sandbox was free within {self._wait_s:g} s"
                )
        try:
            if self._ended:
                raise EnvironmentFailed("the episode has ended")
            yield
        finally:
            if free:
                self._places.release()

    def _why(self, outcome: ProgramResult) -> str:
        limits = self._sandbox.limits
        return {
            "": "",
            "time": f"stopped after {limits.seconds:g} s",
            "memory": f"stopped above {limits.memory_bytes // MIB} MiB of memory",
            "output": f"stopped after {limits.output_bytes} bytes of output",
            "processes": f"stopped above {limits.processes} processes",
            "over": "stopped: the episode has ended",
        }[outcome.stopped]


def _said(called: Called) -> str:
    """What a program printed, as the model reads it."""
    if called.stopped:
        raise ToolError(f"{called.stopped}; {UNDONE}")
    parts = [called.stdout.rstrip("\n"), called.stderr.rstrip("\n")]
    if called.returncode:
        parts.append(f"[exit code {called.returncode}]")
    return "\n".join(part for part in parts if part) or "[no output]"


def _done(called: Called) -> str:
    """The same of a program that is to succeed."""
    if called.returncode:
        raise ToolError(called.stderr.rstrip("\n") or f"exit code {called.returncode}")
    return _said(called)


@cache
def _sandbox(limits: SandboxLimits) -> Sandbox:
    """One for all episodes of a process: to look for bubblewrap takes a moment."""
    return Sandbox("bwrap", limits)


@cache
def _places(at_once: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(at_once)


def _whole(packed: IO[bytes]) -> bool:
    size = os.fstat(packed.fileno()).st_size
    return os.pread(packed.fileno(), len(KEPT), max(0, size - len(KEPT))) == KEPT
