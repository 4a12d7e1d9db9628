"""Whether an actor still gets anywhere: time is counted against it only while nothing moves."""

from __future__ import annotations

from dataclasses import dataclass

# An engine that computes without finishing a step may be in a long one (a long prompt, code that
# is compiled at its first use), or spin for ever: it gets this many times as long.
BUSY_FACTOR = 5.0
# Share of a core from which its processes count as computing.
BUSY_SHARE = 0.2


@dataclass
class Watch:
    """How long an actor has shown no progress, from what it tells in regular beats.

    silent_s: seconds since its number last moved; those in which its engine computed count a
    BUSY_FACTOR-th. total_s: seconds watched. Both leave out time in which the watcher itself did
    not run (a suspended driver).
    """

    silent_s: float = 0.0
    total_s: float = 0.0
    progress: int | None = None
    cpu_s: float = 0.0

    def beat(self, elapsed_s: float, progress: int | None = None, cpu_s: float = 0.0) -> None:
        """elapsed_s: since the beat before. progress, cpu_s: what it told; None: no answer yet."""
        self.total_s += elapsed_s
        if progress is None:
            self.silent_s += elapsed_s
            return
        busy = cpu_s - self.cpu_s > BUSY_SHARE * elapsed_s
        moved = progress != self.progress
        self.silent_s = 0.0 if moved else self.silent_s + elapsed_s / (BUSY_FACTOR if busy else 1.0)
        self.progress, self.cpu_s = progress, cpu_s

    def late(self, since_s: float, limit_s: float) -> bool:
        """Whether nothing has moved for limit_s of the time after since_s (a `total_s`)."""
        return min(self.silent_s, self.total_s - since_s) >= limit_s
