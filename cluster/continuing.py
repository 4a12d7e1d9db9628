"""What a run goes on from, and what it finds in its folder when it does.

`where_to_go_on` is the place where a run that is resumed is compared with the one that was saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohort.cluster.changes import accepted, differences, refusal, split_allowed
from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.files import write_atomically
from cohort.cluster.observe.metrics_file import read_metrics
from cohort.learner.aside import Aside
from cohort.learner.checkpoint import latest, load_state
from cohort.learner.worker import check_shape


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run goes on from, and the driver's state in it."""

    checkpoint: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def where_to_go_on(config: Config, folder: Path) -> Saved | None:
    """The newest complete checkpoint if the run is to be resumed; None to begin at step 0.

    Raises RunError when what is recorded in the folder cannot be gone on from.
    """
    try:
        read_metrics(folder / "metrics.jsonl")
    except ValueError as error:
        raise RunError(f"{error}: move that file away, or choose another run.dir") from error
    found = latest(folder / "checkpoints") if config.run.resume else None
    return Saved(found, load_state(found)) if found else None


def compare(config: Config, saved: Saved, now: dict[str, Any]) -> str:
    """What has changed since the checkpoint, in words; empty when nothing has.

    now: this run's fingerprint. Raises RunError for what must not differ and is not named in
    run.allow_changed, CheckpointError for a learner that cannot load the checkpoint.
    """
    learner = config.learner
    check_shape(saved.checkpoint, learner.workers, learner.zero_stage, config.model.dtype)
    before = saved.state.get("fingerprint")
    if not before:
        return (
            f"{saved.checkpoint} holds no fingerprint of its run, as those of older versions: "
            "whether data, model and config are the same is not known"
        )
    found = differences(before, now, saved.step)
    refused, rest = split_allowed(found, config.run.allow_changed)
    if refused:
        raise RunError(refusal(refused, saved.checkpoint.parent.parent, saved.step))
    return accepted(rest)


def planned_saves(config: Config, first_step: int) -> int:
    """How many checkpoints this run will write."""
    every, steps = config.run.checkpoint_every, config.run.steps
    periodic = (steps - 1) // every - first_step // every if every else 0
    return periodic + 1


def write_config(file: Path, text: str, aside: Aside) -> None:
    """Write config.yaml; one that says something else, run.resume apart, is moved aside first."""
    if file.exists():
        before = file.read_text(encoding="utf-8")
        if before.replace("resume: false", "resume: true") != text.replace(
            "resume: false", "resume: true"
        ):
            aside.move(file)
    write_atomically(file, text)
