"""Running untrusted programs: bubblewrap namespaces and resource limits.

Inside, a program sees a read-only /usr, an empty /tmp of bounded size, no network, no other
process, no file of the host and no variable of its environment. Bubblewrap keeps honest mistakes
and ordinary malice away from the run; against attacks on the kernel itself use a machine, or a
gVisor runtime, that holds nothing else.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NOBODY = 65534
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64")
PATH = "/usr/local/bin:/usr/bin:/bin"
PROBE_S = 10.0


class SandboxError(RuntimeError):
    """No sandbox can be had on this machine; the message says what to install or to set."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one program. seconds: by the clock. Bytes of output: stdout and stderr, each."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a program ended. returncode: None when it was killed for `stopped`."""

    returncode: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    stopped: Literal["", "time", "output"] = ""


class Sandbox:
    """Runs programs, isolated by bubblewrap, or (mode "none") only limited.

    Raises SandboxError when bubblewrap is wanted and not there, or not allowed to work.
    """

    def __init__(
        self, mode: Literal["bwrap", "none"] = "bwrap", limits: Limits | None = None
    ) -> None:
        if mode not in ("bwrap", "none"):
            raise ValueError(f"sandbox must be 'bwrap' or 'none', got {mode!r}")
        self.limits = limits or Limits()
        # util-linux's; limits set inside the namespaces count only what runs there.
        self._prlimit = shutil.which("prlimit", path=PATH)
        if self._prlimit is None:
            raise SandboxError("prlimit (package util-linux) is not installed")
        self._bwrap: str | None = None
        self._user: int | None = None
        if mode == "bwrap":
            self._find()

    def run(self, command: Sequence[str], files: Mapping[str, str], stdin: str = "") -> Outcome:
        """Run a command in an empty folder that holds `files` (name -> text), read-only.

        Raises SandboxError when the sandbox, not the program, failed.
        """
        limits = self.limits
        bounded = [
            str(self._prlimit),
            f"--as={limits.memory_bytes}",
            f"--cpu={int(limits.seconds) + 1}",
            f"--fsize={limits.file_bytes}",
            f"--nproc={limits.processes}",
            "--core=0",
            "--nofile=128",
            "--",
            *command,
        ]
        if self._bwrap is None:
            return self._unisolated(bounded, files, stdin)
        status, told = os.pipe()
        descriptors = [told]
        try:
            wrapped = [self._bwrap, *self._namespaces(), "--json-status-fd", str(told)]
            for name, text in files.items():
                descriptors.append(_in_memory(text))
                wrapped += ["--ro-bind-data", str(descriptors[-1]), f"/work/{name}"]
            wrapped += ["--remount-ro", "/", "--chdir", "/work", "--", *bounded]
            outcome = _supervise(wrapped, stdin, limits, descriptors, self._user, None, {})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            with os.fdopen(status, "rb") as file:
                said = file.read()
        # A sandbox that did not start is no fault of the program.
        if not outcome.stopped and b"exit-code" not in said:
            words = outcome.stderr.decode(errors="replace").strip()
            raise SandboxError(
                f"bwrap could not start a program: {words[:300] or 'no reason given'}"
            )
        return outcome

    def _namespaces(self) -> list[str]:
        options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        options += ["--clearenv", "--setenv", "PATH", PATH, "--setenv", "HOME", "/tmp"]
        options += ["--setenv", "LANG", "C.UTF-8", "--ro-bind", "/usr", "/usr"]
        for name in SYSTEM_FOLDERS:
            folder = Path("/", name)
            if folder.is_symlink():
                options += ["--symlink", os.readlink(folder), str(folder)]
            elif folder.is_dir():
                options += ["--ro-bind", str(folder), str(folder)]
        options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        options += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
        options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        options += ["--size", str(self.limits.file_bytes), "--tmpfs", "/tmp"]
        return [*options, "--perms", "0755", "--dir", "/work"]

    def _find(self) -> None:
        self._bwrap = shutil.which("bwrap")
        why = "bwrap is not installed (package bubblewrap)"
        if self._bwrap is not None:
            # As root, limits on processes do not hold: become nobody first where that works.
            for user in (NOBODY, None) if os.getuid() == 0 else (None,):
                self._user = user
                try:
                    outcome = self.run(["/usr/bin/true"], {"probe": ""})
                except (SandboxError, PermissionError) as error:
                    why = str(error)
                    continue
                if outcome.returncode == 0:
                    return
                words = outcome.stderr.decode(errors="replace").strip()
                why = f"bwrap cannot work here: {words[:300] or outcome.stopped}"
        raise SandboxError(
            f"no sandbox for the code that the model writes: {why}. Install or allow it, or set "
            "sandbox: none in the options of this reward function to run the code without isolation"
        )

    def _unisolated(self, command: Sequence[str], files: Mapping[str, str], stdin: str) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="cohort-code-") as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            # The limit on processes counts all of the user's here.
            loose = [item for item in command if not item.startswith("--nproc=")]
            environment = {"PATH": PATH, "HOME": folder, "LANG": "C.UTF-8"}
            return _supervise(loose, stdin, self.limits, [], None, folder, environment)


def _in_memory(text: str) -> int:
    """A descriptor of an unnamed file with this text, at its beginning."""
    descriptor = os.memfd_create("cohort")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(text.encode(errors="replace"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _supervise(
    command: Sequence[str],
    stdin: str,
    limits: Limits,
    descriptors: Sequence[int],
    user: int | None,
    folder: str | None,
    environment: Mapping[str, str],
) -> Outcome:
    """Run a command until it ends, or is killed for its time or its output."""
    began = time.monotonic()
    given = _in_memory(stdin)
    try:
        process = subprocess.Popen(
            list(command),
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder or "/",
            env=dict(environment),
            pass_fds=list(descriptors),
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    finally:
        os.close(given)
    assert process.stdout is not None
    assert process.stderr is not None
    collected = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    stopped: Literal["", "time", "output"] = ""
    with process, selectors.DefaultSelector() as selector:
        try:
            for descriptor in collected:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map() and not stopped:
                left = began + limits.seconds - time.monotonic()
                ready = selector.select(max(0.0, left))
                if left <= 0:
                    stopped = "time"
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    collected[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                    elif len(collected[key.fd]) > limits.output_bytes:
                        stopped = "output"
            if not stopped and not _ended(process.pid, began + limits.seconds):
                stopped = "time"
        finally:
            # The whole group, also after a normal end: nothing that it started may stay. The
            # process is not reaped yet, so the group's id is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr = (bytes(data[: limits.output_bytes]) for data in collected.values())
    seconds = time.monotonic() - began
    return Outcome(None if stopped else process.returncode, stdout, stderr, seconds, stopped)


def _ended(pid: int, deadline: float) -> bool:
    """Wait until a child ends, without reaping it; False when the deadline passes before."""
    descriptor = os.pidfd_open(pid)
    try:
        left = max(0.1, deadline - time.monotonic())
        return bool(select.select([descriptor], [], [], left)[0])
    finally:
        os.close(descriptor)
