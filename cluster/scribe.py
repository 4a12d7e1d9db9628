"""The scribe writes rollouts/ from references, so that no completion passes through the driver."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from cluster.tracking import Tracker, table_rows, write_rollouts

WRITE_TIMEOUT_S = 60


class Scribe:
    """One small Ray actor on the driver's node; the driver gets back the few rows it shows."""

    def __init__(self, folder: Path, rows_shown: int, table_every: int, tracker: Tracker) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor = (
            ray.remote(_Writer)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote(str(folder), rows_shown)
        )
        self._table_every = table_every
        self._tracker = tracker

    async def write(self, step: int, groups: list[Any]) -> None:
        """Write a step's groups to rollouts/step-NNNNNN.jsonl; now and then a table for W&B."""
        rows = await asyncio.wait_for(self._actor.write.remote(step, groups), WRITE_TIMEOUT_S)
        if step % self._table_every == 0:
            self._tracker.table(step, rows)

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


class _Writer:
    def __init__(self, folder: str, rows_shown: int) -> None:
        self._folder = Path(folder)
        self._rows_shown = rows_shown

    def write(self, step: int, groups: list[Any]) -> list[dict[str, Any]]:
        import ray

        rows = write_rollouts(self._folder, step, ray.get(groups))
        return table_rows(rows, self._rows_shown)
