"""Running untrusted programs: bubblewrap namespaces and resource limits.

Inside, a program sees a read-only /usr, an empty /tmp of bounded size, no network (not even a
loopback of its own), no other process, no file of the host and no variable of its environment, and
can make no namespaces of its own. Memory and processes are bounded for a program and all that it
starts together, and nothing of it is left when it ends. Bubblewrap keeps honest mistakes and
ordinary malice away from the run; against attacks on the kernel itself use a machine, or a gVisor
runtime, that holds nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cohort.rewards import reaper
from cohort.rewards.seccomp import refused_calls
from cohort.rewards.supervise import (
    HELPERS,
    ProgramResult,
    SandboxLimits,
    Start,
    in_memory,
    readable,
    supervise,
)
from cohort.rewards.usage import ControlGroup, clear_left_groups, user_threads

__all__ = ["ProgramResult", "Sandbox", "SandboxError", "SandboxLimits"]

REAPER = reaper.__file__
NOBODY = 65534
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64")
PATH = "/usr/local/bin:/usr/bin:/bin"
# For the trial, and for the start of a program: its own deadline may be too short for these.
PROBE_S = 10.0


class SandboxError(RuntimeError):
    """This machine has no sandbox; the message says what to install or to set."""


class Sandbox:
    """Runs programs, isolated by bubblewrap or only limited.

    Args:
        mode: "bwrap", or "none": only limited; memory that no process holds, in sockets for
            example, is bounded there by a control group alone.
        limits: On each program.
        control_groups: Bound memory by a control group where one can be made; elsewhere the memory
            is measured every few milliseconds.

    Raises:
        SandboxError: bubblewrap is wanted and missing, or not allowed to work.
    """

    def __init__(
        self,
        mode: Literal["bwrap", "none"] = "bwrap",
        limits: SandboxLimits | None = None,
        control_groups: bool = True,
    ) -> None:
        if mode not in ("bwrap", "none"):
            raise ValueError(f"sandbox must be 'bwrap' or 'none', got {mode!r}")
        self.limits = limits or SandboxLimits()
        # util-linux's; limits set inside the namespaces count only what runs there.
        self._prlimit = shutil.which("prlimit", path=PATH)
        if self._prlimit is None:
            raise SandboxError("prlimit (package util-linux) is not installed")
        self._grouped = control_groups
        clear_left_groups()
        self._bwrap: str | None = None
        self._user: int | None = None
        if mode == "bwrap":
            self.limits = replace(self.limits, seconds=max(PROBE_S, self.limits.seconds))
            try:
                self._find()
            finally:
                self.limits = limits or SandboxLimits()

    def run(
        self,
        command: Sequence[str],
        files: Mapping[str, str],
        stdin: str = "",
        passed: Sequence[int] = (),
        over: int | None = None,
    ) -> ProgramResult:
        """Run a command in an empty folder.

        Args:
            command: The program and its arguments.
            files: Name -> text, read-only in the folder.
            stdin: What the program reads.
            passed: Descriptors that it inherits under the same numbers; closed here once it has
                them.
            over: A descriptor that can be read when the program is no longer wanted.

        Raises:
            SandboxError: The sandbox, not the program, failed.
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
        group = self._group()
        try:
            if self._bwrap is None:
                return self._unisolated(bounded, files, stdin, group, passed, over)
            return self._isolated(bounded, files, stdin, group, passed, over)
        finally:
            if group is not None:
                group.close()

    def _group(self) -> ControlGroup | None:
        """A control group for one program; None where none can be made."""
        if not self._grouped:
            return None
        try:
            return ControlGroup(self.limits.memory_bytes, self.limits.processes + HELPERS)
        except OSError:
            return None

    def _isolated(
        self,
        command: Sequence[str],
        files: Mapping[str, str],
        stdin: str,
        group: ControlGroup | None,
        given: Sequence[int],
        over: int | None,
    ) -> ProgramResult:
        status, report_end = os.pipe()
        waits, gate = os.pipe()
        passed = [*given, report_end, waits]
        wrapped = [str(self._bwrap), *self._namespaces()]
        wrapped += ["--json-status-fd", str(report_end), "--block-fd", str(waits)]
        if (filter_ := refused_calls()) is not None:
            passed.append(in_memory(filter_))
            wrapped += ["--seccomp", str(passed[-1])]
        else:
            wrapped += ["--unshare-user", "--disable-userns"]
        for name, text in files.items():
            passed.append(in_memory(text.encode(errors="replace")))
            wrapped += ["--ro-bind-data", str(passed[-1]), f"/work/{name}"]
        wrapped += ["--remount-ro", "/", "--chdir", "/work", "--", *command]
        report = b""

        def first_process(_: int) -> int | None:
            nonlocal report
            if readable(status, PROBE_S):
                report = os.read(status, 1 << 12)
            found = re.search(rb'"child-pid": *(\d+)', report)
            return int(found[1]) if found else None

        start = Start(wrapped, gate, False, passed, self._user, "/", {}, first_process)
        with os.fdopen(status, "rb") as file:
            outcome = supervise(start, stdin.encode(errors="replace"), self.limits, group, over)
            report += file.read()
        # The sandbox did not start the program.
        if not outcome.stopped and b"exit-code" not in report:
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
        # A mapping of /dev/zero would be memory that no process holds; /dev/full reads the same.
        options += ["--proc", "/proc", "--dev", "/dev", "--dev-bind", "/dev/full", "/dev/zero"]
        options += ["--remount-ro", "/dev"]
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
            f"no sandbox for the code that the model writes: {why}. Install or allow it"
        )

    def _unisolated(
        self,
        command: Sequence[str],
        files: Mapping[str, str],
        stdin: str,
        group: ControlGroup | None,
        given: Sequence[int],
        over: int | None,
    ) -> ProgramResult:
        with tempfile.TemporaryDirectory(prefix="cohort-code-") as folder:
            for name, text in files.items():
                Path(folder, name).write_bytes(text.encode(errors="replace"))
            loose = [item for item in command if not item.startswith("--nproc=")]
            if os.getuid() != 0 and (group is None or not group.bounds_processes):
                # The kernel's limit counts all threads of this user's, and none of root's.
                loose.insert(1, f"--nproc={user_threads() + self.limits.processes}")
            waits, gate = os.pipe()
            reaped = [sys.executable, "-I", "-S", "-B", REAPER, str(waits), *loose]
            environment = {"PATH": PATH, "HOME": folder, "LANG": "C.UTF-8"}
            start = Start(
                reaped, gate, True, [*given, waits], None, folder, environment, lambda pid: pid
            )
            return supervise(start, stdin.encode(errors="replace"), self.limits, group, over)
