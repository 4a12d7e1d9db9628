"""What the ranks on one machine leave to those that come after them, and what ends it all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cohort.actors.process import start_reaper
from cohort.actors.witness import look_at


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank's process runs.

    Attributes:
        node_id: Ray's name of the machine.
        pid: Of the process.
        began: When the process was started, which tells it from a later one of the same number.
    """

    node_id: str
    pid: int
    began: float


class LearnerHome:
    """Owns the shared memory of the ranks on one machine: published weights and copies of state.

    A plain class, which `cohort.learner.gang` makes a Ray actor. The memory outlives every rank,
    and is removed when this process ends, however it ends.

    Args:
        folder: The folder in shared memory.
    """

    def __init__(self, folder: str) -> None:
        start_reaper(Path(folder))

    def cpu_seconds(self, pid: int) -> float:
        """Seconds that a process on this machine has computed; 0 when it is gone."""
        look = look_at([pid])
        return 0.0 if look is None else look.cpu_s

    def end(self, ranks: list[Whereabouts]) -> None:
        """SIGKILL ranks on this machine that are still there: Ray asks, which one that is frozen
        does not hear."""
        import psutil

        for rank in ranks:
            try:
                process = psutil.Process(rank.pid)
                if process.create_time() == rank.began:
                    process.kill()
                    process.wait(timeout=10)
            except (psutil.NoSuchProcess, psutil.TimeoutExpired):
                continue


def here(node_id: str) -> Whereabouts:
    """This process."""
    import psutil

    return Whereabouts(node_id, os.getpid(), psutil.Process().create_time())
