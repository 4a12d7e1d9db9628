"""`cohort eval`: how well a model or a checkpoint does on the task's held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.evaluation import Evaluation, HeldOut
from cohort.cluster.launch import launch
from cohort.cluster.observe.console import Console
from cohort.cluster.prepare import passing_logs, prepare
from cohort.cluster.ray_start import check_start
from cohort.cluster.signals import Signals
from cohort.learner.checkpoint import latest


def checkpoint_model(run_dir: Path) -> Path:
    """The Hugging Face folder inside a run's last complete checkpoint."""
    checkpoint = latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{run_dir} holds no complete checkpoint")
    return checkpoint / "hf"


async def evaluate(config: Config, model: Path | None, console: Console) -> Evaluation:
    """Generate and score held-out prompts: one greedy completion and group_size sampled ones each.

    Args:
        config: Names the task, the rewards and the sampling.
        model: A Hugging Face folder to use instead of model.path.
        console: Shows progress.

    Raises:
        Stopped: A signal ended it.
        CohortError: It cannot start, or generating or scoring failed.
    """
    with Signals() as signals:
        return await signals.cancel(_evaluate(config, model, console, signals))


async def _evaluate(
    config: Config, model: Path | None, console: Console, signals: Signals
) -> Evaluation:
    if model is not None:
        # What it was trained from is of no matter.
        other = {"path": str(model), "init_from": None, "lora": None}
        changed = config.model.model_copy(update=other)
        config = config.model_copy(update={"model": changed})
    prepared = prepare(config)
    if prepared.init_from is not None and config.model.lora is not None:
        raise RunError(
            "model.init_from names an adapter, which engines do not load: evaluate the directory "
            "of the run that trained it, or give what `cohort export` makes of that as --model"
        )
    if prepared.init_from is not None:
        # Without a learner, engines serve what a folder holds.
        prepared = replace(prepared, model_path=str(prepared.init_from))
    held_out = HeldOut.of(prepared, console)
    check_start(config)
    with passing_logs("eval") as log_dir:
        async with launch(
            prepared, console, log_dir, ("engines", "rewards"), signals=signals
        ) as actors:
            console.stage(
                f"{len(held_out.rows)} held-out prompts, greedy and {config.task.group_size} "
                "samples each"
            )
            return await held_out.score(actors.pool, actors.rewards)
