"""Logs of our processes, and the removal of what they leave: processes and shared memory."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

# The same for every process, by whichever path it was imported.
HERE = str(Path(__file__).resolve())
MARKER = "COHORT_REAP"
# In the environment of every process that a supervisor's run starts.
SUPERVISED = "COHORT_SUPERVISED"
SHM = Path("/dev/shm")
WATCHER_START_S = 30
TRACKER_S = 5.0
SWEEP_S = 15.0
# Prefixes of the files through which Python's and vLLM's processes talk to each other.
TALK = ("psm_", "sem.")
RAISED = re.compile(r"\b[A-Z]\w*(Error|Exception): \S.*")

# Read by glibc when a process starts: keep freed memory, in huge pages. By default what is large
# goes back to the kernel at once, and taking it again costs a fault and a cleared page each time.
KEEP_HEAP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"

# Our ends of the watchers' pipes: open for as long as this process lives.
_open_pipes: list[IO[bytes]] = []


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, and those of its children, to a file.

    vLLM's engine runs in child processes that inherit these descriptors, so the file holds the
    child's own last words when it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def running_ray() -> ModuleType | None:
    """The module `ray`, in a process that has joined a cluster; it need not be installed."""
    module = sys.modules.get("ray")
    return module if module is not None and module.is_initialized() else None


@contextlib.contextmanager
def stacks_if_late(timeout_s: float) -> Iterator[None]:
    """Shortly before `timeout_s` seconds have passed in this block, write the stacks of all threads
    to the process's stderr: whoever waits for it is about to give up and kill it.

    A thread without the GIL writes them, so a process that hangs in native code shows where. Blocks
    do not nest: the end of an inner one also ends the outer one's watch.
    """
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def last_lines(path: Path, count: int = 15, start: int = 0) -> str:
    """What to show of a log when its process failed, from byte `start` on: the errors that were
    raised, in their order (the first is usually the cause), then the last lines."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    lines = [line for line in text.splitlines() if line.strip()]
    raised = dict.fromkeys(match.group() for line in lines if (match := RAISED.search(line)))
    shown = [*list(raised)[:5], *lines[-count:]]
    return "\n".join(line[:400] for line in shown)


def start_reaper(*folders: Path) -> None:
    """Make sure that nothing of this process outlives it, even if it is killed with SIGKILL.

    vLLM's engine core and worker survive their parent's SIGKILL. A small watcher in a session of
    its own holds one end of a pipe; when this process ends, however it ends, the pipe closes, and
    the watcher kills every process that inherited this process's marker variable and removes
    `folders` (shared memory files).
    """
    _watch_this_process(*folders)


def start_sweeper() -> None:
    """Remove what processes started below this one leave in /dev/shm when they are killed before
    they have a reaper of their own (`start_reaper`). It ends none of them: Ray does, and what
    uploads a run's last records may outlive the run. A process has one, however many its runs."""
    _start_sweeper_of(os.getpid())


@functools.cache
def _start_sweeper_of(_pid: int) -> None:
    _watch_this_process(kill=False)


def _watch_this_process(*folders: Path, kill: bool = True) -> None:
    marker = uuid.uuid4().hex
    pipe = start_watcher(marker, *folders, kill=kill)
    os.environ[MARKER] = marker
    _open_pipes.append(pipe)


def start_watcher(marker: str, *folders: Path, kill: bool = True) -> IO[bytes]:
    """A watcher as `start_reaper`'s, for the processes that have `marker` as their MARKER variable.

    Args:
        marker: The variable's value.
        folders: Of shared memory; they are removed in the end.
        kill: End them; otherwise only wait for their end, for SWEEP_S at most.

    Returns:
        Its pipe: keep it for as long as these processes may live, and close it to end them.
    """
    environment = {k: value for k, value in os.environ.items() if k not in (MARKER, SUPERVISED)}
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-E", HERE, marker, str(int(kill)), *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
        cwd="/",
    )
    # The process started here ends at once and leaves a child of its own: Ray kills an actor's
    # children before the actor itself, and the watcher must not be one of them.
    watcher.wait(WATCHER_START_S)
    assert watcher.stdin is not None
    return watcher.stdin


def end_tree(pid: int, marker: str, timeout_s: float = 5.0) -> None:
    """SIGKILL a child process, every process below it, and every one with `marker`.

    The child is stopped first and killed last: what it adopted (it may be a subreaper) is below it
    only while it lives. It is left to its parent to be waited for.
    """
    entry = f"{MARKER}={marker}".encode()
    _signal(pid, signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() < began + timeout_s:
        alive = {*_below(pid), *_marked(entry)} - {pid}
        if not alive:
            break
        for other in alive:
            if _is_tracker(other) and time.monotonic() < began + timeout_s / 5:
                continue
            _signal(other, signal.SIGKILL)
        time.sleep(0.01)
    _signal(pid, signal.SIGKILL)
    for other in _marked(entry):
        _signal(other, signal.SIGKILL)


def end_marked(variable: str, value: str, timeout_s: float = math.inf) -> list[int]:
    """SIGKILL every process that has this variable in its environment, until none is left, and
    remove the shared memory that they talked through. Returns those that live after `timeout_s`."""
    entry = f"{variable}={value}".encode()
    files: set[Path] = set()
    began = time.monotonic()
    # One may be starting another while it is being killed: look until none is left.
    while (alive := _marked(entry)) and time.monotonic() < began + timeout_s:
        # Also what was made by one that was killed before it could tell.
        files |= mapped_shared_memory(alive)
        for pid in alive:
            # Python's resource trackers remove the shared memory of the dead, then end themselves.
            if _is_tracker(pid) and time.monotonic() < began + TRACKER_S:
                continue
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    for file in files:
        file.unlink(missing_ok=True)
    _sweep()
    return alive


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """The processes of which this one is the parent, those that have ended and wait for it too."""
    return _family()[0].get(pid, [])


def _family() -> tuple[dict[int, list[int]], set[int]]:
    """The children of every process, and the processes that have ended."""
    children: dict[int, list[int]] = {}
    ended = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # pid (name, with anything in it) state parent ...
                fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
                if fields[0] in (b"Z", b"X"):
                    ended.add(int(entry))
    return children, ended


def _below(pid: int) -> list[int]:
    """The living processes of which this one is parent, grandparent and so on."""
    children, ended = _family()
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return [entry for entry in found if entry not in ended]


def peak_rss(pid: int) -> int:
    """The most memory that a process has had, resident bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reap_also(files: Iterable[Path]) -> None:
    """Tell this process's watcher of files that are to be removed with it."""
    pipe = _open_pipes[-1]
    for file in files:
        pipe.write(f"{file}\n".encode())
    pipe.flush()


def mapped_shared_memory(pids: Iterable[int]) -> set[Path]:
    """Files in /dev/shm that these processes made for talking to each other.

    Found by inode: a semaphore is made under one name and linked to another, and the map shows the
    first.
    """
    inodes = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (
                Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            ):
                name = line.rpartition("/dev/shm/")[2]
                if name != line and name.startswith(TALK):
                    inodes.add(int(line.split()[4]))
    found = set()
    for file in os.scandir("/dev/shm") if inodes else ():
        with contextlib.suppress(FileNotFoundError):
            if file.name.startswith(TALK) and file.inode() in inodes:
                found.add(Path(file.path))
    return found


def _marked(marker: bytes) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if marker in environment.split(b"\0"):
            found.append(int(entry))
    return found


def is_watcher(pid: int) -> bool:
    """Whether this is a watcher of `start_watcher`."""
    try:
        return HERE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _watch(marker: str, kill: bool, folders: list[str]) -> None:
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Until the other end closes: what else there is to remove.
    files = {line.strip() for line in sys.stdin}
    closed = time.monotonic()
    if kill:
        end_marked(MARKER, marker)
    while _marked(f"{MARKER}={marker}".encode()) and time.monotonic() < closed + SWEEP_S:
        time.sleep(0.1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for file in files:
        Path(file).unlink(missing_ok=True)
    _sweep()


def _sweep() -> None:
    """Remove the files of this user's dead processes that Intel's OpenMP keeps in /dev/shm: one for
    each process, and SIGKILL gives it no time to clean up."""
    for left in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        if not _lives(int(left.name.split("_")[-2])):
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether this is a process, neither one that only waits for its parent nor a thread's id."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    return fields["Tgid"] == str(pid) and fields["State"][0] not in "ZX"


if __name__ == "__main__":
    _watch(sys.argv[1], sys.argv[2] == "1", sys.argv[3:])
