"""What the ranks on one machine leave to those that come after them, and what ends it all."""

from __future__ import annotations

import contextlib
import os
import threading
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

    It also writes checkpoints from these copies. A plain class, which `cohort.learner.gang` makes a
    Ray actor. The memory outlives every rank, and is removed when this process ends, however it
    ends.

    Args:
        folder: The folder in shared memory.
        writes: Whether there will be checkpoints to write.
    """

    def __init__(self, folder: str, writes: bool) -> None:
        self._folder = Path(folder)
        start_reaper(self._folder)
        if writes:
            # Seconds of imports, which the first checkpoint would bring into the middle of a step.
            threading.Thread(target=_import_the_writing, daemon=True).start()

    def cpu_seconds(self, pid: int) -> float:
        """Seconds that a process on this machine has computed; 0 when it is gone."""
        look = look_at([pid])
        return 0.0 if look is None else look.cpu_s

    def write(self, rank: int, generation: int, target: str) -> None:
        """Write a rank's part of a checkpoint from its copy, in a thread of its own; see
        `cohort.learner.behind`."""
        _import_the_writing()
        from cohort.learner import behind, copies

        there = copies.Copies(self._folder / copies.FOLDER, rank)
        behind.write(there, generation, rank, Path(target))

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


def _come_last() -> None:
    """Have this thread compute only while the ranks and engines beside it leave a core free, or
    nearly so: nobody waits for it, and of a lower priority alone a third of a core would be left.
    """
    # A sandbox may refuse it; what is written then takes its share of the cores.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _import_the_writing() -> None:
    _come_last()
    # What was copied holds objects of DeepSpeed's, which looks for GPUs when it is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    from cohort.learner import behind  # noqa: F401


def here(node_id: str) -> Whereabouts:
    """This process."""
    import psutil

    return Whereabouts(node_id, os.getpid(), psutil.Process().create_time())
