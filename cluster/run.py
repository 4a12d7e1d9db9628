"""What a training run is made of, where it stands, and the writing down of its steps.

Reporting never ends a run: what cannot be written is counted (`report/*` in metrics.jsonl) and said
once, and training goes on.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cohort.cluster.config import Config
from cohort.cluster.continuing import Best
from cohort.cluster.evaluation import Evaluation, HeldOut
from cohort.cluster.fingerprint import Fingerprint
from cohort.cluster.journal.journal import Journal
from cohort.cluster.journal.records import Place
from cohort.cluster.launch import Services
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters, StepTimes, step_metrics
from cohort.cluster.observe.metrics_file import MetricRow, step_of
from cohort.cluster.observe.rollouts import RolloutWriter
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.publishing import Publisher
from cohort.cluster.ray_watch import Loss
from cohort.cluster.stream import Ahead, Batch, GroupStream
from cohort.learner.checkpoint import Checkpoints
from cohort.learner.learner import Learner, StepResult


@dataclass(frozen=True)
class Finished:
    """A step that the learner has done."""

    batch: Batch
    result: StepResult
    train_s: float


class StepTimer:
    """Measures one step, from now on, and its parts: `with timer("train"): ...`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - began

    def times(self, batch: Batch) -> StepTimes:
        """The times of the step that trained `batch` and ends now."""
        step_s = time.monotonic() - self._began
        return StepTimes.of(batch, self.seconds["train"], self.seconds["sync"], step_s)


@dataclass
class Recorder:
    """Where the steps of a run are written: metrics, completions, the terminal.

    Attributes:
        missed: How often something could not be recorded, by its name.
    """

    tracker: Tracker
    writer: RolloutWriter
    console: Console
    missed: Counter[str] = field(default_factory=Counter)
    _noted: set[str] = field(default_factory=set)

    async def record(self, batch: Batch, places: Sequence[Place], metrics: MetricRow) -> None:
        """Write down one step: completions, metrics, a line for people. Raises nothing.

        Args:
            places: Where the journal has its groups.
        """
        for failure in batch.failures:
            self._note_once(
                f"{failure.kind} {failure.message}",
                f"step {batch.step}: {failure} (further failures of this kind are only counted: "
                "rollout/groups_lost)",
            )
        replaced = self.writer.replaced
        try:
            await self.writer.write(batch.step, places)
        except Exception as error:  # noqa: BLE001 - reporting never ends a run
            self._miss("rollouts", batch.step, error)
        if self.writer.replaced > replaced:
            self.console.note(
                f"step {batch.step}: the rollout writer, which writes rollouts/, was replaced"
            )
        metrics |= {f"report/{name}_missed": count for name, count in self.missed.items()}
        if self.writer.replaced:
            metrics["report/rollout_writer_replaced"] = self.writer.replaced
        self._try("metrics", self.tracker.log, metrics)
        self._try("console", self.console.step, metrics)

    def _try(self, what: str, write: Callable[[MetricRow], None], metrics: MetricRow) -> None:
        try:
            write(metrics)
        except Exception as error:  # noqa: BLE001 - reporting never ends a run
            self._miss(what, step_of(metrics), error)

    def _miss(self, what: str, step: int, error: Exception) -> None:
        self.missed[what] += 1
        text = f"{type(error).__name__}: {error}"
        self._note_once(
            f"{what} {text}",
            f"step {step}: {what} could not be recorded ({text}); training goes on; further errors "
            f"of this kind are only counted (report/{what}_missed)",
        )

    def _note_once(self, reason: str, text: str) -> None:
        """Say something unless it was said for this reason (numbers in it do not count)."""
        key = re.sub(r"\d+", "", reason)
        if key not in self._noted:
            self._noted.add(key)
            self.console.note(text)


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: The next one; so many are done.
        cursor: Where its prompts begin.
        ahead: What is drawn for it and later ones already.
        unrecorded: The step that is done and not written down yet.
    """

    step: int
    cursor: int
    counters: Counters
    ahead: Ahead
    unrecorded: Finished | None = None


@dataclass(frozen=True)
class Writing:
    """A checkpoint that is being written.

    Attributes:
        step: Of the checkpoint.
        task: Ends when it is there, or with why it is not.
        before: The best evaluation without this step's, which counts only with its checkpoint.
    """

    step: int
    task: asyncio.Task[Exception | None]
    before: Best | None


@dataclass
class Saves:
    """The checkpoints of a run.

    Attributes:
        fingerprint: What a run that goes on from them is compared with.
        step: Of the newest one.
        failed_at: When writing one failed last (`time.monotonic`); None once one was written since.
        best: The best evaluation so far; None while there is none.
        writing: The one being written, until its end is noted; None: none.
    """

    checkpoints: Checkpoints
    fingerprint: Fingerprint
    step: int
    failed_at: float | None = None
    best: Best | None = None
    writing: Writing | None = None


@dataclass
class Run:
    """A run whose actors are started, ready to train.

    Attributes:
        held_out: What evaluations are made on; None: there are none.
        stop: Set when it is to end after the current step.
        lost: The server of Ray that is gone.
    """

    config: Config
    actors: Services
    publisher: Publisher
    stream: GroupStream
    journal: Journal
    recorder: Recorder
    saves: Saves
    progress: Progress
    held_out: HeldOut | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    lost: Loss | None = None

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
        progress.ahead = self.stream.ahead()
        progress.unrecorded = finished
        progress.counters.check(self.stream.admitted, self.stream.in_flight)

    async def record(
        self, times: StepTimes, gap: float, evaluation: Evaluation | None = None
    ) -> None:
        """Write down the step that was finished last. Raises nothing: see `Recorder`."""
        finished, self.progress.unrecorded = self.progress.unrecorded, None
        assert finished is not None
        metrics = step_metrics(
            finished.batch,
            finished.result,
            times,
            self.progress.counters,
            self.learner.version,
            gap,
            self.actors.pool.fleet.counts,
            self.learner.restarts,
        )
        if evaluation is not None:
            metrics |= evaluation.metrics()
        await self.recorder.record(finished.batch, self.journal.places(finished.batch), metrics)
        self.journal.forget(finished.batch)
