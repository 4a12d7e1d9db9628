"""Whether something that has work to do has stopped: a pure state machine, fed with looks at it.

Two clocks run while nothing moves. The fast one (`FROZEN_S`) counts only proof: the process is
stopped (SIGSTOP, a debugger, a frozen cgroup), or all of its threads sleep and compute nothing
although it has work. The slow one (a `*_timeout_s` of the config) counts any time without progress.
What is slow and healthy shows progress, computes, or wants to (a thread that is ready to run on a
machine that is too busy, or waits for a disk): the fast clock stands still for it.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of proof, until a process counts as frozen. With BEAT_S between two looks it is found within 15 s.
FROZEN_S = 9.0
BEAT_S = 1.0
# What computes without progress may be in a long step (a long prompt, code that is compiled at its
# first use), or in an endless loop: the slow clock gives it this many times as long.
BUSY_FACTOR = 5.0
# Fraction of a core from which a process counts as computing, for the slow clock.
BUSY_FRACTION = 0.2
# Fraction of a core below which it computes nothing: its libraries' threads wake now and then.
IDLE_FRACTION = 0.05


@dataclass(frozen=True)
class Look:
    """What the kernel tells of some processes at one moment.

    Attributes:
        pids: The processes.
        cpu_s: Seconds that all their threads have computed so far.
        stopped: One of the processes is stopped.
        awake: A thread runs, is ready to run, or waits for a disk.
    """

    pids: tuple[int, ...]
    cpu_s: float
    stopped: bool
    awake: bool


@dataclass
class Watch:
    """How long something has made no progress.

    Attributes:
        silent_s: Seconds since its progress last moved; those in which it computed count a
            BUSY_FACTOR-th.
        frozen_s: Seconds of proof that it is frozen, without progress in between.
        total_s: Seconds watched. All three leave out time in which the watcher itself did not run.
        progress: The number that it told last.
        look: The last look at its processes.
    """

    silent_s: float = 0.0
    frozen_s: float = 0.0
    total_s: float = 0.0
    progress: int | None = None
    look: Look | None = None

    def beat(
        self,
        elapsed_s: float,
        progress: int | None = None,
        look: Look | None = None,
        working: bool = True,
    ) -> None:
        """Take note of a look.

        Args:
            elapsed_s: Since the one before.
            progress: A number that moves with its work; None: it did not answer.
            look: At its processes; None: they could not be seen.
            working: Whether it has something to do right now.
        """
        self.total_s += elapsed_s
        before, self.look = self.look, look
        load = _load(before, look, elapsed_s)
        moved = progress is not None and progress != self.progress
        if progress is not None:
            self.progress = progress
        if moved:
            self.silent_s = self.frozen_s = 0.0
            return
        busy = progress is not None and load is not None and load > BUSY_FRACTION
        self.silent_s += elapsed_s / (BUSY_FACTOR if busy else 1.0)
        if look is None or not working or (load is not None and load >= IDLE_FRACTION):
            self.frozen_s = 0.0
        elif look.stopped or (load is not None and not look.awake):
            self.frozen_s += elapsed_s

    def late(self, since_s: float, limit_s: float) -> bool:
        """Whether nothing has moved for limit_s of the time after since_s (a `total_s`)."""
        return min(self.silent_s, self.total_s - since_s) >= limit_s

    @property
    def frozen(self) -> bool:
        """Whether it is proven that nothing will move any more by itself."""
        return self.frozen_s >= FROZEN_S

    def heard(self) -> None:
        """It has answered: begin anew."""
        self.silent_s = self.frozen_s = 0.0


def _load(before: Look | None, now: Look | None, elapsed_s: float) -> float | None:
    """Cores that the same processes have kept busy between two looks; None: not known."""
    if before is None or now is None or before.pids != now.pids or elapsed_s <= 0:
        return None
    return (now.cpu_s - before.cpu_s) / elapsed_s
