"""What a run records: metrics.jsonl (the truth), rollouts/, and Weights & Biases on the side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

from cohort.cluster.config import Config
from cohort.cluster.observe.metrics_file import MetricsFile, step_row
from cohort.cluster.observe.rollouts import RolloutRow
from cohort.cluster.observe.wandb_run import WandbRun, run_id, wandb_mode
from cohort.learner.aside import Aside


class Tracker:
    """Records a run in its directory, and in W&B as far as W&B allows.

    W&B never raises: its first failure is one warning, and the run goes on with metrics.jsonl.

    Args:
        run_dir: The run directory.
        config: The run's config.
        resume_state: What `state()` returned when the checkpoint was saved that the run continues
            from; None for a new run.
        first_step: The first step that will be logged: the number of completed steps in that
            checkpoint, 0 for a new run. Rows and rollout files from there on belong to work that
            will be done again, and are moved aside.
        aside: Where they are moved.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        resume_state: Mapping[str, str | None] | None = None,
        *,
        first_step: int = 0,
        aside: Aside | None = None,
    ) -> None:
        rollouts = run_dir / "rollouts"
        rollouts.mkdir(parents=True, exist_ok=True)
        aside = aside or Aside(run_dir)
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", first_step, aside)
        for file in sorted(rollouts.glob("step-*.jsonl")):
            if int(file.stem.removeprefix("step-")) >= first_step:
                aside.move(file)
        self._wandb: WandbRun | None = None
        self._wandb_id = resume_state["wandb_id"] if resume_state else None
        mode = wandb_mode(config.tracking.wandb, os.environ)
        if mode != "disabled":
            self._wandb_id = run_id(run_dir / "wandb_id", self._wandb_id)
            self._wandb = WandbRun(run_dir, config, mode, self._wandb_id)

    def describe(self) -> str:
        """One line for people: where W&B data goes."""
        return "W&B: disabled" if self._wandb is None else self._wandb.describe()

    def state(self) -> dict[str, str | None]:
        """What to keep in a checkpoint, so that a resumed run is the same W&B run."""
        return {"wandb_id": self._wandb_id}

    def log(self, metrics: Mapping[str, SupportsFloat | None]) -> None:
        """Append one step to metrics.jsonl; on disk when this returns.

        Args:
            metrics: A value for each of STEP_KEYS, and any others.

        Raises:
            ValueError: A key is missing, a value is not a number, or the step is not above the
                last one.
            OSError: The file cannot be written; the row is written with the next one.
        """
        row = step_row(metrics)
        self._metrics.add(row)
        if self._wandb is not None:
            self._wandb.log(row)
        self._metrics.write()

    def table(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Show completions of a step as a W&B table."""
        if self._wandb is not None and rows:
            self._wandb.table(step, rows)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run with this exit code and close the files. May be called twice."""
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code)
