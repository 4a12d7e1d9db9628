"""The writing down of a run's steps.

Reporting never ends a run: what cannot be written is counted (`report/*` in metrics.jsonl) and said
once, and training goes on.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters, StepTimes, step_metrics
from cohort.cluster.observe.rollout_writer import RolloutWriter
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.stream import Batch
from cohort.learner.learner import StepResult


@dataclass(frozen=True)
class Finished:
    """A step that the learner has done."""

    batch: Batch
    result: StepResult
    train_s: float

    def times(self) -> StepTimes:
        """What is known of the step's times before its weights are published."""
        batch = self.batch
        step_s = batch.generate_s + batch.reward_s + self.train_s
        return StepTimes(step_s, batch.generate_s, batch.reward_s, self.train_s, sync=0.0)


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
        return StepTimes(
            step=time.monotonic() - self._began,
            generate=batch.generate_s,
            reward=batch.reward_s,
            train=self.seconds["train"],
            sync=self.seconds["sync"],
        )


@dataclass
class Recorder:
    """Where the steps of a run are written: metrics, completions, the terminal.

    missed: how often something could not be recorded, by its name.
    """

    tracker: Tracker
    writer: RolloutWriter
    console: Console
    missed: Counter[str] = field(default_factory=Counter)
    _noted: set[str] = field(default_factory=set)

    async def record(
        self,
        finished: Finished,
        times: StepTimes,
        counters: Counters,
        *,
        version: int,
        gap: float,
        restarts: int,
    ) -> None:
        """Write down one step: completions, metrics, a line for people. Raises nothing."""
        batch = finished.batch
        for failure in batch.failures:
            self._note_once(
                f"{failure.kind} {failure.message}",
                f"step {batch.step}: {failure} (further failures of this kind are only counted: "
                "rollout/groups_lost)",
            )
        replaced = self.writer.replaced
        try:
            await self.writer.write(batch.step, [group.ref for group in batch.groups])
        except Exception as error:  # noqa: BLE001 - reporting never ends a run
            self._miss("rollouts", batch.step, error)
        if self.writer.replaced > replaced:
            self.console.note(
                f"step {batch.step}: the rollout writer, which writes rollouts/, was replaced"
            )
        metrics = step_metrics(batch, finished.result, times, counters, version, gap, restarts)
        metrics |= {f"report/{name}_missed": count for name, count in self.missed.items()}
        if self.writer.replaced:
            metrics["report/rollout_writer_replaced"] = self.writer.replaced
        self._try("metrics", self.tracker.log, metrics)
        self._try("console", self.console.step, metrics)

    def _try(
        self, what: str, write: Callable[[dict[str, Any]], None], metrics: dict[str, Any]
    ) -> None:
        try:
            write(metrics)
        except Exception as error:  # noqa: BLE001 - reporting never ends a run
            self._miss(what, metrics["step"], error)

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
