"""What this process may use of the machine: cores and memory, within the limits of its cgroups.

A container on a machine of 64 cores and 500 GiB may have 4 and 16 of them; what the kernel tells
everyone (/proc/meminfo, the CPU affinity) is the machine's. Both versions of cgroups are read,
alone or side by side, and of nested groups the tightest bound counts.
"""

from __future__ import annotations

import itertools
import os
import platform
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 has no word for "no limit": a number near 2**63, rounded to pages.
NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class CgroupLimits:
    """Bounds of the cgroups that a process is in; None where there is none.

    Attributes:
        cpus: Cores' worth of time (a quota of 1.5), or the size of the cpuset.
        memory: Bytes that all of the group may use.
        available: Bytes that are left of them; cache of files counts as free.
    """

    cpus: float | None
    memory: int | None
    available: int | None


def cgroup_limits(root: Path = Path("/"), pid: str = "self") -> CgroupLimits:
    """The tightest bounds on a process.

    Args:
        root: Where /proc and /sys are found.
        pid: The process; "self": this one.
    """
    cpus: list[float] = []
    memory: list[int] = []
    available: list[int] = []
    for controllers, folder in cgroups(root, pid):
        if controllers is None or "memory" in controllers:
            for limit, left in (_memory_v2 if controllers is None else _memory_v1)(folder):
                memory.append(limit)
                available.append(left)
        if controllers is None:
            cpus += [*_quota(_text(folder / "cpu.max"))]
        elif "cpu" in controllers:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            cpus += [*_quota(f"{quota} {period}")]
        if controllers is None or "cpuset" in controllers:
            names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
            found = (_set_size(_text(folder / name)) for name in names)
            cpus += [size for size in found if size][:1]
    return CgroupLimits(
        min(cpus, default=None), min(memory, default=None), min(available, default=None)
    )


def usable_cores(root: Path = Path("/")) -> tuple[int, ...]:
    """The cores to run on: those of the affinity, no more than the quota is worth, at least one.

    Where a quota leaves a choice, it depends on the host's name: containers side by side would
    otherwise all pin their threads to the same first cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    limit = cgroup_limits(root).cpus
    count = len(cores) if limit is None else max(1, min(len(cores), int(limit)))
    if count == len(cores):
        return tuple(cores)
    first = zlib.crc32(platform.node().encode()) % len(cores)
    return tuple(sorted((cores[first:] + cores[:first])[:count]))


def cgroups(
    root: Path = Path("/"), pid: str = "self"
) -> Iterator[tuple[frozenset[str] | None, Path]]:
    """Every group of the process, up to the mount point; controllers: None for version 2."""
    paths: dict[str, str] = {}
    for line in _text(root / "proc" / pid / "cgroup").splitlines():
        _, names, where = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), where)
    for line in _text(root / "proc" / pid / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        top, place = (_unescaped(word).rstrip("/") for word in before.split(" ")[3:5])
        controllers = (
            None if kind == "cgroup2" else frozenset(paths.keys() & set(options.split(",")))
        )
        if controllers is not None and not controllers:
            continue
        path = paths.get("" if controllers is None else min(controllers))
        if path is None:
            continue
        mount = root / place.lstrip("/")
        inside = path.removeprefix(top) if f"{path}/".startswith(f"{top}/") else ""
        # A path with ".." is outside of what is mounted here: only the mount's own group is seen.
        parts = [] if ".." in path.split("/") else inside.strip("/").split("/")
        for depth in range(len(parts), -1, -1):
            yield controllers, mount.joinpath(*parts[:depth])


def _memory_v2(folder: Path) -> Iterator[tuple[int, int]]:
    used = _bytes(folder / "memory.current") or 0
    cache = _statistic(folder, "inactive_file") or 0
    # Above memory.high the kernel slows a group down until nothing moves.
    for name in ("memory.max", "memory.high"):
        limit = _bytes(folder / name)
        if limit is not None:
            yield limit, max(0, limit - max(0, used - cache))


def _memory_v1(folder: Path) -> Iterator[tuple[int, int]]:
    used = _bytes(folder / "memory.usage_in_bytes") or 0
    cache = _statistic(folder, "total_inactive_file") or 0
    # The second holds for groups above that cannot be seen from here.
    own = _bytes(folder / "memory.limit_in_bytes")
    for limit in (own, _statistic(folder, "hierarchical_memory_limit")):
        if limit is not None:
            yield limit, max(0, limit - max(0, used - cache))


def _quota(text: str) -> Iterator[float]:
    """Cores of "QUOTA PERIOD"; nothing for "max" and -1."""
    words = text.split()
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _set_size(text: str) -> int:
    """How many numbers "0-3,8" holds."""
    size = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            size += int(last or first) - int(first) + 1
    return size


def _statistic(folder: Path, name: str) -> int | None:
    for line in _text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _bounded(value)
    return None


def _bytes(file: Path) -> int | None:
    return _bounded(_text(file))


def _bounded(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another version, another controller, or not to be seen from here
        return ""


def _unescaped(word: str) -> str:
    r"""A path of mountinfo, which writes a space as \040."""
    return word.encode().decode("unicode_escape") if "\\" in word else word


def split_cores(cores: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Disjoint, contiguous, near-equal shares of a node's cores.

    With more parts than cores, neighbours share one: every part gets at least one core.

    >>> split_cores((0, 1, 2, 3), 2)
    [(0, 1), (2, 3)]
    """
    if parts >= len(cores):
        return [(cores[index % len(cores)],) for index in range(parts)]
    bounds = [len(cores) * index // parts for index in range(parts + 1)]
    return [cores[start:end] for start, end in itertools.pairwise(bounds)]
