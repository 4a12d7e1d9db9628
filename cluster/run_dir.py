"""The run directory: whether it is a run's, which driver uses it, what a new start finds in it.

The first thing that a run writes is `cohort.lock`, which marks the folder as a run's and names its
one driver. The lock ends with its owner, however that ends: on one machine the kernel releases it;
for other machines, which may not see that, a living owner touches the file every few seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from cohort.cluster.config import SECTIONS, Config, expand
from cohort.cluster.errors import RunError
from cohort.learner.aside import Aside

LOCK = "cohort.lock"
# What `cohort scale` asks for, and what became of it.
SCALE_REQUEST, SCALE_ANSWER = "scale.json", "scaled.json"
HEARTBEAT_S = 5.0
# An owner on another machine is dead after so many seconds without a heartbeat.
SILENCE_S = 45.0
# What a run writes.
NAMES = re.compile(
    r"cohort\.lock|config\.yaml(\.tmp)?|metrics\.jsonl(\.tmp)?|rollouts|checkpoints|logs|wandb"
    r"|wandb_id(\.tmp)?|journal|report\.html|replaced-\d+|scaled?\.json(\.tmp)?"
)
CHECKPOINT = re.compile(r"(step|tmp|gone)-\w+")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# File systems without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """The driver that uses a run directory.

    Attributes:
        host: Name of its machine.
        boot: Id of the machine's running kernel, the same in all its containers.
        pid: Of the driver.
        since: When it began, in ISO format.
        command: Its command line.
    """

    host: str
    boot: str
    pid: int
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


def this_process() -> Owner:
    boot = (
        BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.is_file() else socket.gethostname()
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(socket.gethostname(), boot, os.getpid(), now, " ".join(sys.argv)[:500])


class RunDir:
    """A run directory that belongs to this driver until `release`; a context manager.

    Attributes:
        path: The folder.
        aside: Keeps what this start finds and must replace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = Aside(path)
        self._file: int | None = None
        self._beating: threading.Thread | None = None
        self._end = threading.Event()

    def claim(self) -> None:
        """Make the folder and lock it.

        Raises:
            RunError: It cannot be written, or another driver uses it.
        """
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(file)
            except BaseException:
                os.close(file)
                raise
            self._file = file
            # A full disk shows here and not after the engines have started.
            _write(file, json.dumps(asdict(this_process())))
        except OSError as error:
            self.release()
            raise RunError(f"run.dir={self.path} cannot be written: {error.strerror}") from error
        self._beating = threading.Thread(target=self._beat, args=(file,), daemon=True)
        self._beating.start()

    def _lock(self, file: int) -> None:
        locked = _flock(file, fcntl.LOCK_EX)
        owner = _owner(file)
        if locked is False:
            raise RunError(in_use(self.path, owner))
        if owner is not None and (locked is None or owner.boot != this_process().boot):
            # The lock of another machine may not be seen here. Its owner is alive if it keeps
            # touching the file, by the file system's time and not by this machine's clock.
            before = self._beaten()
            waiting = time.time() + SILENCE_S
            while self._age(before) < SILENCE_S and time.time() < waiting:
                time.sleep(0.2)
                if self._beaten() != before:
                    raise RunError(in_use(self.path, owner))

    def _beaten(self) -> float:
        """When the lock was last touched. Opens the file, because NFS caches times of open ones."""
        with (self.path / LOCK).open("rb") as lock:
            return os.fstat(lock.fileno()).st_mtime

    def _age(self, then: float) -> float:
        """Seconds since `then` by the file system's time."""
        probe = self.path / "logs" / f".now-{os.getpid()}"
        probe.touch()
        try:
            return probe.stat().st_mtime - then
        finally:
            probe.unlink()

    def _beat(self, file: int) -> None:
        while not self._end.wait(HEARTBEAT_S):
            try:
                os.utime(file)
            except OSError:
                continue  # full or away for a while: the next heartbeat tries again

    def release(self) -> None:
        """Let another driver use the folder. May be called twice."""
        self._end.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # the next owner finds a silent one
                os.ftruncate(file, 0)
            os.close(file)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def in_use(folder: Path, owner: Owner | None) -> str:
    who = "another process, which has just started" if owner is None else str(owner)
    return f"run.dir={folder} is in use by {who}. Wait for it or stop it, or choose another run.dir"


def find_run_dir(config: Config) -> Path:
    """The run's folder, which need not exist yet; writes nothing.

    Raises:
        RunError: It is a file, holds something else than a run, holds a run and run.resume is not
            set, or is in use by another driver.
    """
    folder = expand(config.run.dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir={folder} is a file")
    if not is_ours(folder):
        raise RunError(f"run.dir={folder} holds other files and no run: choose another run.dir")
    _refuse_if_in_use(folder)
    _refuse_if_recorded(config, folder)
    return folder


def is_ours(folder: Path) -> bool:
    """Whether a run may write here: the folder is empty, or holds only what runs write."""
    if not folder.is_dir():
        return True
    names = {entry.name for entry in folder.iterdir()}
    if LOCK in names:
        return True
    if "config.yaml" in names:
        return _is_config(folder / "config.yaml")
    # A failed start of an earlier version.
    checkpoints = folder / "checkpoints"
    inside = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return all(map(NAMES.fullmatch, names)) and all(map(CHECKPOINT.fullmatch, inside))


def _is_config(file: Path) -> bool:
    """Whether this is a config of Cohort; other programs use the name, too."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and bool(tree) and set(tree) <= set(SECTIONS)


def what_was_recorded(folder: Path) -> str:
    """What the folder holds of a run's training, in words; empty for none.

    A failed start leaves a lock, logs and perhaps a config, which are not training.
    """
    found = []
    checkpoints = sorted(entry.name for entry in folder.glob("checkpoints/step-*"))
    if checkpoints:
        found.append(f"checkpoints {', '.join(checkpoints)}")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and (rows := metrics.read_bytes().count(b"\n")):
        found.append(f"metrics of {rows} steps")
    if rollouts := len(list(folder.glob("rollouts/step-*.jsonl"))):
        found.append(f"completions of {rollouts} steps")
    if not found and (folder / "config.yaml").is_file() and not (folder / LOCK).is_file():
        # Of an earlier version, which wrote it once everything had started.
        found.append("config.yaml")
    return ", ".join(found)


def claim_run_dir(config: Config) -> RunDir:
    """Make the run's folder if needed and lock it for this driver.

    Raises:
        RunError: As `find_run_dir`, and when the folder cannot be written.
    """
    claimed = RunDir(find_run_dir(config))
    claimed.claim()
    try:
        # Again, because another driver may have begun and ended in between.
        _refuse_if_recorded(config, claimed.path)
    except BaseException:
        claimed.release()
        raise
    return claimed


def _refuse_if_recorded(config: Config, folder: Path) -> None:
    if not config.run.resume and (found := what_was_recorded(folder)):
        raise RunError(
            f"run.dir={folder} already holds a run: add run.resume=true to continue it, or "
            f"choose another run.dir (found: {found})"
        )


def _refuse_if_in_use(folder: Path) -> None:
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or `claim` says what is wrong with it
    try:
        if _flock(file, fcntl.LOCK_SH) is False:
            raise RunError(in_use(folder, _owner(file)))
    finally:
        os.close(file)


def living_owner(folder: Path) -> Owner | None:
    """The driver that uses a run directory now; None when there is none.

    An owner on another machine, whose lock may not be seen from here, is waited for to touch its
    lock: some seconds.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        owner, locked = _owner(file), _flock(file, fcntl.LOCK_SH)
        if owner is None or locked is False:
            return owner
        if locked and owner.boot == this_process().boot:
            return None
        before, until = os.fstat(file).st_mtime, time.monotonic() + 3 * HEARTBEAT_S
        while time.monotonic() < until:
            time.sleep(0.2)
            # Opened anew: NFS asks the server for the times of a file when it is opened.
            with (folder / LOCK).open("rb") as lock:
                if os.fstat(lock.fileno()).st_mtime != before:
                    return owner
        return None
    except OSError:
        return None  # it is being removed
    finally:
        os.close(file)


def _flock(file: int, kind: int) -> bool | None:
    """Lock a file unless another process has it; None where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _owner(file: int) -> Owner | None:
    """The owner that a lock names; None when it was released or is being written."""
    try:
        return Owner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)
    os.fsync(file)
