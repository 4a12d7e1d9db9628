"""Where a run goes on from, and the comparison with the run that was saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from pydantic import JsonValue

from cohort.cluster.changes import accepted, differences, refusal, split_allowed
from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.files import write_atomically
from cohort.cluster.fingerprint import Fingerprint
from cohort.cluster.observe.metrics_file import read_metrics
from cohort.learner.aside import Aside
from cohort.learner.checkpoint import check_shape, latest, load_state


class SavedState(TypedDict):
    """The driver's own state in a checkpoint, as JSON.

    Attributes:
        step: Steps that are done.
        cursor: Position in the sequence of training prompts at which the next step begins.
        counters: What `Counters.resumed` takes.
        tracking: What the tracker goes on with.
        pass_rates: What the task's history of pass rates goes on with; None for tasks without one.
        fingerprint: What the resumed run is compared with; older checkpoints have none.
    """

    step: int
    cursor: int
    counters: dict[str, int]
    tracking: dict[str, str | None]
    pass_rates: dict[str, JsonValue] | None
    fingerprint: NotRequired[Fingerprint]


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run goes on from, and the driver's state in it."""

    checkpoint: Path
    state: SavedState

    @classmethod
    def load(cls, checkpoint: Path) -> Saved:
        return cls(checkpoint, cast(SavedState, load_state(checkpoint)))

    @property
    def step(self) -> int:
        return self.state["step"]


def where_to_go_on(config: Config, folder: Path) -> Saved | None:
    """The newest complete checkpoint if the run is to be resumed; None to begin at step 0.

    Raises:
        RunError: The folder's metrics cannot be read.
    """
    try:
        read_metrics(folder / "metrics.jsonl")
    except ValueError as error:
        raise RunError(f"{error}: move that file away, or choose another run.dir") from error
    found = latest(folder / "checkpoints") if config.run.resume else None
    return Saved.load(found) if found else None


def compare(config: Config, saved: Saved, now: Fingerprint) -> str:
    """Compare this run with the one that was saved.

    Args:
        config: This run's config.
        saved: The checkpoint to go on from.
        now: This run's fingerprint.

    Returns:
        A message about what has changed; empty when nothing has.

    Raises:
        RunError: Something differs that must not, and run.allow_changed does not name it.
        CheckpointError: This learner cannot load the checkpoint.
    """
    learner = config.learner
    check_shape(saved.checkpoint, learner.workers, learner.zero_stage, config.model.dtype)
    before = saved.state.get("fingerprint")
    if not before:
        return (
            f"{saved.checkpoint} is of an older version and holds no fingerprint of its run: "
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
    """Write config.yaml; a different one (run.resume aside) is moved away first."""
    off, on = "resume: false", "resume: true"
    if file.exists() and file.read_text(encoding="utf-8").replace(off, on) != text.replace(off, on):
        aside.move(file)
    write_atomically(file, text)
