"""Memory and processes of one program together: a control group where one can be made, or a look.

A limit of the kernel on a process (RLIMIT_AS) bounds each one alone. A control group bounds their
sum, with files in memory and the kernel's own. Where none can be made (no root, no delegation),
`look` adds up what a program and all that it started hold now, sockets of a sandbox included. Pipes
are left to the kernel's own bound (fs.pipe-user-pages-soft, 64 MiB for all of a user's).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cohort.actors.machine import cgroups

PREFIX = "cohort-test-"
EMPTY_S = 5.0
# What the kernel holds for a file of a tmpfs, beside its pages.
INODE_BYTES = 1024
LISTS_CHILDREN = Path("/proc/thread-self/children")
COUNT = re.compile(r"^oom_kill (\d+)", re.MULTILINE)
_numbers = itertools.count()


class ControlGroup:
    """A control group of each version that bounds one program; `close` ends all that is in it.

    Args:
        memory_bytes: Of all its processes together.
        processes: At a time.

    Raises:
        OSError: No group that bounds memory can be made here.
    """

    def __init__(self, memory_bytes: int, processes: int) -> None:
        self._folders: list[Path] = []
        self.bounds_memory = self.bounds_processes = False
        name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        # Memory that does not fit is not to be swapped out either; not every kernel counts it.
        v1 = {"memory.limit_in_bytes": memory_bytes, "memory.memsw.limit_in_bytes": memory_bytes}
        v2 = {"memory.max": memory_bytes, "memory.swap.max": 0, "memory.oom.group": 1}
        try:
            for parent in _parents():
                folder = parent / name
                folder.mkdir()
                self._folders.append(folder)
                written = [
                    file
                    for file, value in {**v1, **v2, "pids.max": processes}.items()
                    if _wrote(folder / file, value)
                ]
                self.bounds_memory |= bool({"memory.max", "memory.limit_in_bytes"} & {*written})
                self.bounds_processes |= "pids.max" in written
            if not self.bounds_memory:
                raise OSError("no control group here bounds memory")
        except OSError:
            self.close()
            raise

    def add(self, pid: int) -> None:
        """Move a process in; what it starts from now on is in it too."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid), encoding="utf-8")

    def ran_out(self) -> bool:
        """Whether the kernel has killed a process here because memory ran out."""
        events = [_read(folder / "memory.events") for folder in self._folders]
        events += [_read(folder / "memory.oom_control") for folder in self._folders]
        return any(int(found) for text in events for found in COUNT.findall(text))

    def close(self) -> None:
        """Kill every process in the group, and remove it."""
        for folder in self._folders:
            give_up = time.monotonic() + EMPTY_S
            while pids := _read(folder / "cgroup.procs").split():
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                if time.monotonic() > give_up:
                    break
                time.sleep(0.002)
            _remove(folder, give_up)
        self._folders = []


def clear_left_groups() -> None:
    """Remove the groups of processes that were killed before they could."""
    for parent in _parents():
        for folder in parent.glob(f"{PREFIX}*-*"):
            owner = folder.name.removeprefix(PREFIX).partition("-")[0]
            if not Path("/proc", owner).exists():
                _remove(folder, 0.0)


def _parents() -> list[Path]:
    """Where groups that bound memory or processes may be made: one folder for each hierarchy."""
    found: dict[frozenset[str] | None, Path] = {}
    for controllers, folders in itertools.groupby(cgroups(), key=lambda pair: pair[0]):
        own, *above = [folder for _, folder in folders]
        if controllers is None:
            # Of version 2 only the root, or a group without processes of its own, can be divided:
            # the one above, where it was handed over for this (a delegated one).
            able = [
                folder
                for folder in (own, *above[:1])
                if "memory" in _read(folder / "cgroup.subtree_control")
            ]
        else:
            able = [own] if controllers & {"memory", "pids"} else []
        writable = [folder for folder in able if os.access(folder, os.W_OK)]
        if writable:
            found.setdefault(controllers, writable[0])
    return list(found.values())


def _wrote(file: Path, value: int) -> bool:
    if not file.exists():
        return False
    try:
        file.write_text(str(value), encoding="utf-8")
    except OSError:
        return False
    return True


def _remove(folder: Path, give_up: float) -> None:
    """A group can be removed once its last process has been waited for."""
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > give_up:
                return
            time.sleep(0.005)
        else:
            return


@dataclass(frozen=True)
class Look:
    """What a process and all that it started hold at one moment.

    Attributes:
        processes: How many they are.
        memory_bytes: Of all together.
    """

    processes: int
    memory_bytes: int


def look(pid: int, most_bytes: int, most_processes: int) -> Look:
    """Add up a process and its descendants.

    Args:
        pid: The process.
        most_bytes: The limit; pages that forked processes share count once where that decides about
            it.
        most_processes: The limit; above it not all are counted.
    """
    pids = descendants(pid, most_processes)
    memory = sum(_resident(each) for each in pids)
    if memory > most_bytes:
        memory = sum(_shared_out(each) for each in pids)
    return Look(len(pids), memory + _temporary_files(pids[-1]) + _sockets(pids))


def descendants(pid: int, most: int) -> list[int]:
    """A process and all below it, parents first.

    Args:
        pid: The process.
        most: Processes after which it stops: a tree may grow faster than it can be read.
    """
    found = [pid]
    if not LISTS_CHILDREN.exists():
        below = _by_parent()
        for each in found:
            found += below.get(each, [])
        return found
    for each in found:
        if len(found) > most:
            break
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{each}/task"):
                children = _read(Path(f"/proc/{each}/task/{task}/children"))
                found += [int(child) for child in children.split()]
    return found


def _by_parent() -> dict[int, list[int]]:
    """Every process, for kernels that do not list children."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = _read(Path(f"/proc/{entry}/stat")).rpartition(")")[2].split()
        if entry.isdigit() and fields:
            found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def user_threads() -> int:
    """Threads of all processes of this user."""
    threads = 0
    for entry in os.listdir("/proc"):
        text = _read(Path(f"/proc/{entry}/status")) if entry.isdigit() else ""
        found = re.search(r"^Uid:\s+(\d+).*^Threads:\s+(\d+)", text, re.MULTILINE | re.DOTALL)
        threads += int(found[2]) if found and int(found[1]) == os.getuid() else 0
    return threads


def _resident(pid: int) -> int:
    fields = _read(Path(f"/proc/{pid}/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _shared_out(pid: int) -> int:
    """Resident memory, with a page that n processes share as its n-th part."""
    found = re.search(r"^Pss:\s+(\d+) kB", _read(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
    return int(found[1]) * 1024 if found else _resident(pid)


def _temporary_files(pid: int) -> int:
    """Bytes of files in the /tmp that this process sees, where that is memory of its own."""
    inside = f"/proc/{pid}/root/tmp"
    try:
        if os.stat(inside).st_dev == os.stat("/tmp").st_dev:
            return 0
        files = os.statvfs(inside)
    except OSError:
        return 0
    used = (files.f_blocks - files.f_bfree) * files.f_frsize
    return used + (files.f_files - files.f_ffree) * INODE_BYTES


def _sockets(pids: Sequence[int]) -> int:
    """The most that sockets of a network of these processes' own may hold, read or not.

    No process's memory has it, and a closed socket keeps it until what it has sent is read.
    """
    own = _network("self")
    for pid in pids:
        # Parents come first: after bwrap itself, this is one that the program cannot end.
        if _network(pid) not in (own, None):
            used = re.search(r"^sockets: used (\d+)", _read(Path(f"/proc/{pid}/net/sockstat")))
            # A message may be begun below the bound of a buffer, and end above it.
            return 2 * _socket_buffer() * int(used[1]) if used else 0
    return 0


def _network(pid: int | str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


@functools.cache
def _socket_buffer() -> int:
    # In a container the file may be missing.
    return int(_read(Path("/proc/sys/net/core/wmem_default")) or 212_992)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
