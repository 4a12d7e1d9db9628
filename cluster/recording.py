"""What a run is made of, where it stands, and the writing down of its steps.

Reporting never ends a run: what cannot be written is counted (`report/*` in metrics.jsonl) and said
once, and training goes on.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cohort.actors.pool import RolloutPool
from cohort.cluster.config import Config
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters, StepTimes, step_metrics
from cohort.cluster.observe.rollout_writer import RolloutWriter
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.stream import Batch, GroupStream
from cohort.learner.checkpoint import Checkpoints
from cohort.learner.learner import Learner, StepResult


@dataclass(frozen=True)
class Finished:
    """A step that the learner has done."""

    batch: Batch
    result: StepResult
    train_s: float


@dataclass
class Run:
    """Everything that a run consists of, started and ready, and where it stands.

    step: the next one; so many are done. cursor: where its prompts begin. saved: the step of the
    newest checkpoint. unrecorded: the step that is done and not written down yet. unsaved_since:
    when a checkpoint could last not be written. missed: what could not be recorded, by its name.
    lost: why no actor will answer any more. fingerprint: what a run that goes on from this one's
    checkpoints is compared with.
    """

    config: Config
    pool: RolloutPool
    learner: Learner
    stream: GroupStream
    tracker: Tracker
    writer: RolloutWriter
    console: Console
    checkpoints: Checkpoints
    several_nodes: bool
    probe_ids: list[int]
    probe_tolerance: float
    stop: asyncio.Event
    step: int
    counters: Counters
    probe_floor: float | None = None
    cursor: int = field(init=False)
    saved: int = field(init=False)
    unrecorded: Finished | None = None
    unsaved_since: float | None = None
    missed: Counter[str] = field(default_factory=Counter)
    said: set[str] = field(default_factory=set)
    lost: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cursor = self.stream.cursor
        self.saved = self.step

    def finish(self, finished: Finished) -> None:
        """Count a step as done. Raises AssertionError when samples were lost."""
        self.counters.add(finished.batch, finished.result)
        self.step = finished.batch.step + 1
        self.cursor = finished.batch.cursor
        self.unrecorded = finished
        self.counters.check(self.stream.admitted, self.stream.in_flight)

    def note_once(self, reason: str, text: str) -> None:
        """Say something unless it was said for this reason (numbers in it do not count)."""
        key = re.sub(r"\d+", "", reason)
        if key not in self.said:
            self.said.add(key)
            self.console.note(text)


async def record(run: Run, times: StepTimes, gap: float) -> None:
    """Write down the step that was done: completions, metrics, a line for people."""
    finished, run.unrecorded = run.unrecorded, None
    assert finished is not None
    batch, result = finished.batch, finished.result
    for failure in batch.failures:
        run.note_once(
            f"{failure.kind} {failure.message}",
            f"step {batch.step}: {failure.what}: {failure.message} (its like is only counted from "
            "now on: rollout/groups_lost)",
        )
    replaced = run.writer.replaced
    try:
        await run.writer.write(batch.step, [group.ref for group in batch.groups])
    except Exception as error:  # noqa: BLE001 - reporting never ends a run
        _missed(run, "rollouts", batch.step, error)
    if run.writer.replaced > replaced:
        run.console.note(
            f"step {batch.step}: the rollout writer, which writes rollouts/, was replaced"
        )
    metrics = step_metrics(
        batch, result, times, run.counters, run.learner.version, gap, run.pool.restarts
    )
    metrics |= {f"report/{name}_missed": count for name, count in run.missed.items()}
    metrics |= (
        {"report/rollout_writer_replaced": run.writer.replaced} if run.writer.replaced else {}
    )
    for what, say in (("metrics", run.tracker.log), ("console", run.console.step)):
        _try(run, what, batch.step, say, metrics)


async def record_late(run: Run) -> None:
    """Write down a step after which the run failed, before its times and its gap were known."""
    if run.unrecorded is not None:
        batch, train_s = run.unrecorded.batch, run.unrecorded.train_s
        step_s = batch.generate_s + batch.reward_s + train_s
        times = StepTimes(step_s, batch.generate_s, batch.reward_s, train_s, sync=0.0)
        await record(run, times, math.nan)


def _try(
    run: Run, what: str, step: int, say: Callable[[dict[str, Any]], None], metrics: dict[str, Any]
) -> None:
    try:
        say(metrics)
    except Exception as error:  # noqa: BLE001 - reporting never ends a run
        _missed(run, what, step, error)


def _missed(run: Run, what: str, step: int, error: Exception) -> None:
    run.missed[what] += 1
    text = f"{type(error).__name__}: {error}"
    run.note_once(
        f"{what} {text}",
        f"step {step}: {what} could not be recorded ({text}); training goes on, and its like is "
        f"only counted (report/{what}_missed)",
    )
