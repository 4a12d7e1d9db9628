"""Limits of cgroups, read from made-up trees of /proc and /sys, and from a real group of version 1
where this machine lets us make one."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cohort.actors.machine import CgroupLimits, cgroup_limits, usable_cores

GIB = 2**30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
V1 = "\n".join(
    f"3{place} 31 0:3{place} {{top}} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"
    for place, name in enumerate(("memory", "cpu,cpuacct", "cpuset"))
)
NOTHING = CgroupLimits(None, None, None)


def tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(
        "22 28 0:21 / /proc rw - proc proc rw\n" + mountinfo + "\n"
    )
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, NOTHING),
        ({"a/b/memory.max": "max", "a/b/cpu.max": "max 100000"}, NOTHING),
        ({"a/b/cpu.max": "150000 100000"}, CgroupLimits(1.5, None, None)),
        ({"a/b/cpu.max": "50000 100000", "cpu.max": "900000 1"}, CgroupLimits(0.5, None, None)),
        # the parent is tighter
        ({"a/b/cpu.max": "800000 100000", "a/cpu.max": "20000 5000"}, CgroupLimits(4, None, None)),
        ({"a/b/cpuset.cpus.effective": "0-3,8"}, CgroupLimits(5, None, None)),
        ({"a/b/memory.max": str(8 * GIB)}, CgroupLimits(None, 8 * GIB, 8 * GIB)),
        # cache of files can be taken back
        (
            {
                "a/b/memory.max": str(8 * GIB),
                "a/b/memory.current": str(5 * GIB),
                "a/b/memory.stat": f"anon 1\ninactive_file {2 * GIB}",
            },
            CgroupLimits(None, 8 * GIB, 5 * GIB),
        ),
        # a parent with more, of which others use nearly all
        (
            {
                "a/b/memory.max": str(8 * GIB),
                "a/memory.max": str(100 * GIB),
                "a/memory.current": str(99 * GIB),
            },
            CgroupLimits(None, 8 * GIB, GIB),
        ),
        ({"a/b/memory.high": str(GIB), "a/memory.max": str(2 * GIB)}, CgroupLimits(None, GIB, GIB)),
        (
            {"a/b/memory.max": str(GIB), "a/b/memory.current": str(3 * GIB)},
            CgroupLimits(None, GIB, 0),
        ),
        ({"a/b/memory.max": "nonsense", "a/b/cpu.max": "100000"}, NOTHING),
        ({"a/b/cpu.max": "100000 0"}, NOTHING),
    ],
)  # fmt: skip
def test_version_2(tmp_path: Path, files: dict[str, str], expected: CgroupLimits) -> None:
    assert cgroup_limits(tree(tmp_path, "0::/a/b\n", V2, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, NOTHING),
        (
            {
                "memory/a/memory.limit_in_bytes": "9223372036854771712",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "cpuset/a/cpuset.cpus": "",
            },
            NOTHING,
        ),
        (
            {
                "memory/a/memory.limit_in_bytes": str(4 * GIB),
                "memory/a/memory.usage_in_bytes": str(3 * GIB),
                "memory/a/memory.stat": f"total_inactive_file {GIB}\ncache 5",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "cpuset/a/cpuset.effective_cpus": "1-2",
                "cpuset/a/cpuset.cpus": "0-7",
            },
            CgroupLimits(2, 4 * GIB, 2 * GIB),
        ),
        (
            {
                "memory/a/memory.limit_in_bytes": str(8 * GIB),
                "memory/memory.limit_in_bytes": str(2 * GIB),
                "memory/memory.usage_in_bytes": str(GIB),
            },
            CgroupLimits(None, 2 * GIB, GIB),
        ),
        # a group above the container's, which shows only here
        (
            {
                "memory/a/memory.limit_in_bytes": "9223372036854771712",
                "memory/a/memory.stat": f"hierarchical_memory_limit {2 * GIB}",
            },
            CgroupLimits(None, 2 * GIB, 2 * GIB),
        ),
    ],
)
def test_version_1(tmp_path: Path, files: dict[str, str], expected: CgroupLimits) -> None:
    groups = "5:memory:/a\n4:cpu,cpuacct:/a\n3:cpuset:/a\n1:name=systemd:/x\n0::/y\n"
    assert cgroup_limits(tree(tmp_path, groups, V1.format(top="/"), files)) == expected


@pytest.mark.parametrize(
    ("group", "mount"),
    [
        # Docker without a cgroup namespace: its group is mounted, /proc shows the host's path
        ("0::/docker/abc\n", V2.replace(" / /sys", " /docker/abc /sys")),
        # with one
        ("0::/\n", V2),
        # a path outside of what is mounted
        ("0::/../../other\n", V2),
        ("0::/elsewhere\n", V2.replace(" / /sys", " /docker/abc /sys")),
        # the path is not in this mount at all
        ("0::/docker/abc\n", V2),
        # a name that another begins with
        ("0::/docker/abcd\n", V2.replace(" / /sys", " /docker/abc /sys")),
    ],
)
def test_containers(tmp_path: Path, group: str, mount: str) -> None:
    files = {"memory.max": str(GIB), "cpu.max": "300000 100000"}
    assert cgroup_limits(tree(tmp_path, group, mount, files)) == CgroupLimits(3, GIB, GIB)


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    mounts = V1.format(top="/") + "\n" + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    files = {
        "memory/p/memory.limit_in_bytes": str(3 * GIB),
        "unified/q/cpu.max": "100000 100000",
        "cpu,cpuacct/p/cpu.cfs_quota_us": "400000",
        "cpu,cpuacct/p/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, "5:memory:/p\n4:cpu,cpuacct:/p\n0::/q\n", mounts, files)
    assert cgroup_limits(root) == CgroupLimits(1, 3 * GIB, 3 * GIB)


def test_a_mount_with_a_space(tmp_path: Path) -> None:
    mount = V2.replace("/sys/fs/cgroup ", r"/sys/fs/cgroup/a\040b ")
    root = tree(tmp_path, "0::/\n", mount, {"a b/cpu.max": "1 2"})
    assert cgroup_limits(root).cpus == 0.5


def test_no_proc_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == NOTHING
    assert usable_cores(tmp_path) == tuple(sorted(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("quota", "count"), [(0.2, 1), (1.0, 1), (1.9, 1), (3.0, 3), (64, 8)])
def test_cores_are_whole_and_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: float, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 18)))
    root = tree(tmp_path, "0::/\n", V2, {"cpu.max": f"{int(quota * 100000)} 100000"})
    cores = usable_cores(root)
    assert len(cores) == len(set(cores)) == count
    assert set(cores) <= set(range(10, 18))


def test_a_real_group_of_version_1() -> None:
    above = Path("/sys/fs/cgroup/memory")
    name = f"cohort-test-{uuid.uuid4().hex[:8]}"
    outer, inner = above / name, above / name / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(512 << 20))
        (inner / "memory.limit_in_bytes").write_text(str(2 * GIB))
    except OSError as error:
        if outer.is_dir():
            outer.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    code = (
        "import os, pathlib, cohort.actors.machine as m\n"
        f"pathlib.Path({str(inner)!r}, 'cgroup.procs').write_text(str(os.getpid()))\n"
        "print(m.cgroup_limits())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        found = eval(done.stdout, {"CgroupLimits": CgroupLimits})
    finally:
        inner.rmdir()
        outer.rmdir()
    assert found.memory == 512 << 20
    assert 400 << 20 < found.available < 512 << 20
