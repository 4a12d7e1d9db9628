"""Writes rollouts/ from references, so that no completion passes through the driver."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cohort.actors.errors import failure_of
from cohort.actors.records import GroupRef, ScoredGroup
from cohort.cluster.observe.rollouts import RolloutRow, rollout_file, table_rows
from cohort.cluster.observe.tracking import Tracker

if TYPE_CHECKING:
    pass

T = TypeVar("T")

# How often a slow write is asked for its progress, and how long it may make none. How long it takes
# in all does not matter: a step may have gigabytes of completions.
ASK_S = 5.0
STALLED_S = 120.0
ATTEMPTS = 2


class RolloutWriterError(Exception):
    """A step's completions could not be written; the message says why."""


class RolloutWriter:
    """One small Ray actor on the driver's node; the driver gets back only the rows it shows.

    An actor that died or makes no progress is replaced.

    Args:
        folder: rollouts/ of the run.
        rows_shown: Completions of a step in the W&B table.
        table_every: Steps between tables.
        tracker: Shows them.

    Attributes:
        replaced: How often the actor was replaced.
    """

    def __init__(self, folder: Path, rows_shown: int, table_every: int, tracker: Tracker) -> None:
        self._folder = folder
        self._rows_shown = rows_shown
        self._table_every = table_every
        self._tracker = tracker
        self.replaced = 0
        self._actor = self._make()

    def _make(self) -> Any:  # Ray's types know methods of an actor only as plain functions
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(_Writer)
            # Two calls at a time: one writes, the other reports progress.
            .options(num_cpus=0, scheduling_strategy=here, max_concurrency=2)
            .remote(str(self._folder), self._rows_shown)
        )

    async def write(self, step: int, groups: Sequence[GroupRef]) -> None:
        """Write a step's groups to rollouts/step-NNNNNN.jsonl; every few steps a W&B table, too.

        Raises:
            RolloutWriterError: They could not be written.
        """
        from ray.exceptions import RayTaskError

        why = ""
        for _ in range(ATTEMPTS):
            try:
                rows = await self._patiently(self._actor.write.remote(step, groups))
            except Exception as error:  # noqa: BLE001 - sorted here
                why = failure_of(error, "the rollout writer").message.strip().splitlines()[-1]
                if isinstance(error, RayTaskError):
                    break  # the actor lives, and would fail again
                self._replace()
            else:
                if step % self._table_every == 0:
                    self._tracker.table(step, rows)
                return
        raise RolloutWriterError(f"rollouts/step-{step:06d}.jsonl was not written: {why}")

    async def _patiently(self, writing: Awaitable[list[RolloutRow]]) -> list[RolloutRow]:
        """The answer to `write`, as long as there is progress; raises TimeoutError without any."""
        answer = asyncio.ensure_future(_value(writing))
        seen, still_s = -1, 0.0
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=ASK_S)
                if done:
                    return answer.result()
                still_s += ASK_S
                with contextlib.suppress(TimeoutError):
                    progress = await asyncio.wait_for(_value(self._actor.progress.remote()), ASK_S)
                    if progress != seen:
                        seen, still_s = progress, 0.0
                if still_s >= STALLED_S:
                    raise TimeoutError(f"nothing was written for {STALLED_S:.0f} s")
        finally:
            answer.cancel()

    def _replace(self) -> None:
        self.kill()
        self.replaced += 1
        self._actor = self._make()

    def kill(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self._actor)


async def _value(reference: Awaitable[T]) -> T:
    return await reference


class _Writer:
    """The actor.

    Args:
        folder: Where the files go.
        rows_shown: At most so many rows of a step are returned.
    """

    def __init__(self, folder: str, rows_shown: int) -> None:
        self._folder = Path(folder)
        self._rows_shown = rows_shown
        self._done = 0

    def write(self, step: int, groups: Sequence[GroupRef]) -> list[RolloutRow]:
        """Write a step's file; returns the rows to show."""
        import ray

        shown: list[RolloutRow] = []
        with rollout_file(self._folder, step) as add:
            # One after the other: this process should not hold a whole step, which may be large.
            for group in groups:
                shown += table_rows(
                    add(group if isinstance(group, ScoredGroup) else ray.get(group)),
                    self._rows_shown,
                )
                self._done += 1
        return table_rows(shown, self._rows_shown)

    def progress(self) -> int:
        """Groups written so far, over all steps."""
        return self._done
