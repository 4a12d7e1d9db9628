"""What a training run is made of, and where it stands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cohort.cluster.config import Config
from cohort.cluster.fingerprint import Fingerprint
from cohort.cluster.launch import Services
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters, StepTimes
from cohort.cluster.publishing import Publisher
from cohort.cluster.recording import Finished, Recorder
from cohort.cluster.stream import GroupStream
from cohort.learner.checkpoint import Checkpoints
from cohort.learner.learner import Learner


@dataclass
class Progress:
    """Where a run stands.

    step: the next one; so many are done. cursor: where its prompts begin. unrecorded: the step that
    is done and not written down yet.
    """

    step: int
    cursor: int
    counters: Counters
    unrecorded: Finished | None = None


@dataclass
class Saves:
    """The checkpoints of a run.

    fingerprint: what a run that goes on from them is compared with. step: of the newest one.
    failed_at: when a checkpoint could last not be written, while none has been since.
    """

    checkpoints: Checkpoints
    fingerprint: Fingerprint
    step: int
    failed_at: float | None = None


@dataclass
class Run:
    """A run whose actors are started, ready to train.

    stop: set when it is to end after the step in hand. lost: why no actor will answer any more.
    """

    config: Config
    actors: Services
    publisher: Publisher
    stream: GroupStream
    recorder: Recorder
    saves: Saves
    progress: Progress
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    lost: str = ""

    @property
    def learner(self) -> Learner:
        return self.actors.learner

    @property
    def console(self) -> Console:
        return self.recorder.console

    def finish(self, finished: Finished) -> None:
        """Count a step as done. Raises AssertionError when samples were lost."""
        progress = self.progress
        progress.counters.add(finished.batch, finished.result)
        progress.step = finished.batch.step + 1
        progress.cursor = finished.batch.cursor
        progress.unrecorded = finished
        progress.counters.check(self.stream.admitted, self.stream.in_flight)

    async def record(self, times: StepTimes, gap: float) -> None:
        """Write down the step that was finished last. Raises nothing: see `Recorder`."""
        finished, self.progress.unrecorded = self.progress.unrecorded, None
        assert finished is not None
        await self.recorder.record(
            finished,
            times,
            self.progress.counters,
            version=self.learner.version,
            gap=gap,
            restarts=self.actors.pool.restarts,
        )
