"""`cohort train --supervise`: a small parent that starts the run again when its driver is lost.

The parent imports none of the libraries that a run can die of. It starts the same command as a
child, with `run.resume=true` from the second start on, and ends what a dead run has left before it
starts the next one. A run that ended by itself, well or with an error of its own, is not started
again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cohort.actors.errors import TRY_AGAIN
from cohort.actors.process import SHM, SUPERVISED, children, end_marked, is_watcher
from cohort.cluster.config import Config, expand
from cohort.cluster.run_dir import LOCK, SILENCE_S
from cohort.cluster.signals import STOPPING
from cohort.cluster.waiting import STACKS

GIVEN_UP = 1
# Pauses before the second start without a new step and the later ones.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
LOOK_S = 1.0
# How long what a dead run has left may take to end, and its watchers to clean up after it.
END_S, WATCHERS_S = 20.0, 20.0
# How long a driver may take to write its stacks.
STACKS_S = 1.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Of metrics.jsonl, which hold its last line.
LAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Again:
    """Start the run again.

    Attributes:
        pause_s: Seconds to wait before.
        why: For people.
    """

    pause_s: float
    why: str


@dataclass(frozen=True)
class Leave:
    """End the supervisor.

    Attributes:
        code: The exit code.
        why: For people.
    """

    code: int
    why: str


@dataclass
class Starts:
    """Decides whether a run is started again.

    Attributes:
        limit: Lost starts in a row that are made good without a step beyond `furthest`.
        furthest: The most steps that the run has had.
        lost: Starts that were lost since it last got further.

    Example:
        >>> starts = Starts(limit=1)
        >>> starts.after(-9, steps=3, asked=None).pause_s
        0.0
        >>> starts.after(-9, steps=3, asked=None).code
        1
    """

    limit: int
    furthest: int = 0
    lost: int = 0

    def after(self, code: int, steps: int, asked: int | None) -> Again | Leave:
        """What to do when a start has ended.

        Args:
            code: The driver's exit code; minus the signal that killed it.
            steps: That are recorded now.
            asked: The signal that asked the supervisor to stop; None: nobody did.
        """
        how = _how(code)
        gone = code < 0 or code == TRY_AGAIN
        if code == 0:
            return Leave(0, "the run is done")
        if asked == signal.SIGINT and (gone or code == 128 + asked):
            return Leave(128 + asked, "stopped; run.resume=true goes on")
        if asked is not None and (gone or code == 128 + asked):
            return Leave(TRY_AGAIN, f"stopped by {_name(asked)}; run.resume=true goes on")
        if not gone:
            return Leave(code, f"the run {how}, which a new start would not change")
        if steps > self.furthest:
            self.furthest, self.lost = steps, 0
        self.lost += 1
        if self.lost > self.limit:
            return Leave(
                GIVEN_UP,
                f"the run {how} after {steps} steps, {self.lost} times in a row without a step "
                f"beyond {self.furthest}: given up (cluster.restarts={self.limit})",
            )
        doubled = FIRST_PAUSE_S * 2 ** (self.lost - 2)
        pause_s = 0.0 if self.lost == 1 else min(doubled, LONGEST_PAUSE_S)
        return Again(
            pause_s,
            f"the run {how} after {steps} steps: starting it again in {pause_s:g} s "
            f"({self.lost} of {self.limit} without a new step)",
        )


def _how(code: int) -> str:
    if code == TRY_AGAIN:
        return "lost what it ran on"
    return f"was killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass
class Heartbeat:
    """Whether the owner of a run directory still touches its lock.

    A driver that is stopped or hangs in the kernel does not; one that only waits does.
    """

    touched: float = 0.0
    seen_at: float | None = None

    def silent(self, touched: float | None, now: float) -> bool:
        """Whether nothing was heard for SILENCE_S.

        Args:
            touched: The time of the lock's file; None: the lock is not ours.
            now: Seconds on the clock that `seen_at` is of.
        """
        if touched is None or self.seen_at is None or touched != self.touched:
            self.touched, self.seen_at = touched or 0.0, now
        return now - self.seen_at > SILENCE_S


def command(config: Path, overrides: Sequence[str], *, resume: bool) -> list[str]:
    """The command of one start: as it was given, and with `run.resume=true` where that is said."""
    again = ["run.resume=true"] if resume else []
    return [sys.executable, "-m", "cohort.cluster.cli", "train", str(config), *overrides, *again]


def recorded_steps(folder: Path) -> int:
    """The steps that a run directory has metrics of, without a line that is being written."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"]) + 1
    return 0


class Supervisor:
    """Starts the driver, hears signals, and leaves nothing of a dead run.

    Args:
        start: The command of the first start (False) and of later ones (True).
        folder: The run directory.
        config: The run's; its keys `cluster.restarts` and `cluster.stop_grace_s` are used.
        say: Prints a line.
    """

    def __init__(
        self,
        start: Callable[[bool], list[str]],
        folder: Path,
        config: Config,
        say: Callable[[str], None],
    ) -> None:
        self._start = start
        self._folder = folder
        self._grace_s = config.cluster.stop_grace_s
        self._starts = Starts(config.cluster.restarts, recorded_steps(folder))
        self._say = say
        self._mark = uuid.uuid4().hex
        self._asked: int | None = None

    def run(self) -> int:
        """Run to the end; returns the exit code."""
        # What a dead driver leaves becomes ours, so that it can be waited for.
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        heard = {n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
        try:
            return self._run(heard)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self, heard: set[signal.Signals]) -> int:
        again = False
        while True:
            code = self._one_start(again, heard)
            if code < 0 or code == TRY_AGAIN:
                self._clean()
            next_ = self._starts.after(code, recorded_steps(self._folder), self._asked)
            self._say(next_.why)
            if isinstance(next_, Leave):
                return next_.code
            ends = time.monotonic() + next_.pause_s
            while self._asked is None and (left := ends - time.monotonic()) > 0:
                self._hear(heard, left)
            if self._asked is not None:
                stopped = self._starts.after(-self._asked, 0, self._asked)
                return stopped.code if isinstance(stopped, Leave) else TRY_AGAIN
            again = True

    def _one_start(self, again: bool, heard: set[signal.Signals]) -> int:
        """Start the driver and wait for its end: its exit code, or minus the signal's number."""

        def in_the_child() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*heard, signal.SIGCHLD})
            # Without us nobody would start it again or clean up after it: it saves and leaves.
            _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        child = subprocess.Popen(
            self._start(again),
            env={**os.environ, SUPERVISED: self._mark},
            # A Ctrl-C of the terminal comes to us alone, and goes on to the driver once.
            start_new_session=True,
            preexec_fn=in_the_child,
        )
        heartbeat, kill_at = Heartbeat(), float("inf")
        while (code := child.poll()) is None:
            number = self._hear({*heard, signal.SIGCHLD}, LOOK_S)
            now = time.monotonic()
            if number is not None and kill_at < float("inf"):
                self._say(f"{_name(number)} again: ending the run at once")
                child.kill()
            elif number is not None:
                self._say(f"{_name(number)}: the run has {self._grace_s:g} s to save")
                child.send_signal(number)
                kill_at = now + self._grace_s
            elif now > kill_at:
                self._say(f"not saved within cluster.stop_grace_s={self._grace_s:g}: ending it")
                _end(child)
            elif heartbeat.silent(self._touched(child.pid), now):
                self._say(f"the driver did not touch {LOCK} for {SILENCE_S:g} s: ending it")
                _end(child)
            _reap(child.pid)
        _remove_weights(child.pid)
        return code

    def _hear(self, numbers: set[signal.Signals], timeout_s: float) -> int | None:
        """The number of a signal that asks us to stop and came in this time."""
        info = signal.sigtimedwait(numbers, timeout_s)
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        self._asked = self._asked or info.si_signo
        return info.si_signo

    def _touched(self, driver: int) -> float | None:
        """When the driver last touched its run directory; None while the lock is not its own."""
        lock = self._folder / LOCK
        try:
            if json.loads(lock.read_text(encoding="utf-8"))["pid"] != driver:
                return None
            return lock.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _clean(self) -> None:
        """End what a dead run has left, so that no second Ray, engine or file stays behind."""
        if left := end_marked(SUPERVISED, self._mark, END_S):
            self._say(f"processes {left} of the last start cannot be ended; going on without")
        began = time.monotonic()
        while (adopted := _reap(0)) and time.monotonic() < began + WATCHERS_S:
            for pid in adopted:
                # One that has set a title, as Ray's agents do, has overwritten its environment.
                if not is_watcher(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if adopted:
            self._say(f"processes {adopted} are still cleaning up; going on without")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a driver that does not end by itself; its stacks say where it was."""
    child.send_signal(STACKS)
    time.sleep(STACKS_S)
    child.kill()


def _remove_weights(driver: int) -> None:
    """Remove the published weights of a driver that is gone."""
    for folder in SHM.glob(f"cohort-learner-{driver}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _reap(besides: int) -> list[int]:
    """Collect those of our adopted children that have ended; the others that live."""
    for pid in children(os.getpid()):
        if pid != besides:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return [pid for pid in children(os.getpid()) if pid != besides]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def supervise(config: Path, overrides: Sequence[str], resolved: Config) -> int:
    """Train under a supervisor; returns the exit code.

    Args:
        config: The file.
        overrides: As given on the command line.
        resolved: Both, read.
    """

    def say(line: str) -> None:
        print(f"supervisor: {line}", file=sys.stderr, flush=True)

    def start(again: bool) -> list[str]:
        return command(config, overrides, resume=again or resolved.run.resume)

    return Supervisor(start, expand(resolved.run.dir).absolute(), resolved, say).run()
