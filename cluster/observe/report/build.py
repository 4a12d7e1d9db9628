"""A run directory, read into plain records of bounded size: everything that the page shows.

Of long runs a part is chosen, files are read line by line, and the run may still be growing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cohort.actors.config import ActorsConfig
from cohort.actors.errors import CohortError
from cohort.cluster.config import ConfigError, ModelConfig, RunConfig
from cohort.cluster.config_file import read_tree
from cohort.cluster.observe.metrics_file import MetricRow, read_metrics, step_of
from cohort.cluster.observe.report.completions import (
    Completions,
    ReportLimits,
    choose_completions,
)
from cohort.cluster.observe.report.curves import (
    Chart,
    Curves,
    Tile,
    choose_charts,
    curves,
    numeric,
    tiles,
)
from cohort.learner.checkpoint import latest
from cohort.learner.config import AlgorithmConfig
from cohort.rewards.config import EnvironmentsConfig, TaskConfig

Section = TypeVar("Section", bound=BaseModel)


class ReportError(CohortError):
    """No page can be made; the message says why, and what to change."""


@dataclass(frozen=True)
class RecordedRun:
    """What is known of the run as a whole; None where its config.yaml does not say.

    Attributes:
        checkpoint: Steps done in the last complete checkpoint.
        seconds: Wall clock of all finished steps.
        written: When metrics.jsonl last grew, in UTC.
        made: When the run was read, in UTC.
    """

    name: str
    folder: str
    model: str | None
    task: str | None
    preset: str | None
    steps_done: int
    steps_total: int | None
    checkpoint: int | None
    seconds: float
    written: str
    made: str


@dataclass(frozen=True)
class Report:
    """Everything on the page; `notes` say what was chosen, left out or could not be known."""

    run: RecordedRun
    tiles: tuple[Tile, ...]
    curves: Curves
    charts: tuple[Chart, ...]
    completions: Completions
    notes: tuple[str, ...]


def build(run_dir: Path, limits: ReportLimits, now: datetime) -> Report:
    """Read a run directory, finished or still growing.

    Raises:
        ReportError: The folder is not a run directory, or its metrics are damaged.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ReportError(f"{run_dir} is not a run directory: it holds no metrics.jsonl")
    rows = _metrics(metrics)
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)

    tree, problems = _config(run_dir / "config.yaml")
    run = _section(tree, "run", RunConfig, problems)
    model = _section(tree, "model", ModelConfig, problems)
    task = _section(tree, "task", TaskConfig, problems)
    actors = _section(tree, "actors", ActorsConfig, problems)
    algorithm = _section(tree, "algorithm", AlgorithmConfig, problems)

    environments = _section(tree, "environments", EnvironmentsConfig, problems)
    max_tokens = actors.max_tokens if actors else None
    if actors and environments and task and task.environment is not None:
        max_tokens = actors.max_tokens * environments.max_turns
    completions = choose_completions(run_dir / "rollouts", limits, algorithm, max_tokens)
    drawn = curves(rows)
    last = latest(run_dir / "checkpoints")
    return Report(
        run=RecordedRun(
            name=run_dir.resolve().name,
            folder=str(run_dir),
            model=model.path if model else None,
            task=task.name if task else None,
            preset=algorithm.preset if algorithm else None,
            steps_done=step_of(rows[-1]) + 1 if rows else 0,
            steps_total=run.steps if run else None,
            checkpoint=int(last.name.removeprefix("step-")) if last else None,
            seconds=sum(numeric(row, "time/step") or 0.0 for row in rows),
            written=_time(written),
            made=_time(now),
        ),
        tiles=tiles(rows, max_tokens),
        curves=drawn,
        charts=choose_charts([series.key for series in drawn.series]),
        completions=completions,
        notes=(
            *problems,
            *_curve_notes(drawn, len(rows)),
            *_completion_notes(completions, limits, algorithm if actors else None),
        ),
    )


def _metrics(file: Path) -> list[MetricRow]:
    """The rows in order of steps; of a step that was written twice the later one."""
    try:
        by_step = {step_of(row): row for row in read_metrics(file)}
    except ValueError as error:
        raise ReportError(f"the metrics are damaged: {error}") from error
    except OSError as error:
        raise ReportError(f"cannot read {file}: {error.strerror}") from error
    return [by_step[step] for step in sorted(by_step)]


def _config(file: Path) -> tuple[Mapping[str, object], list[str]]:
    """The config's sections, unchecked, and what is wrong with the file."""
    if not file.is_file():
        return {}, ["There is no config.yaml: the run's length and advantages are not known."]
    try:
        return read_tree(file), []
    except ConfigError as error:
        return {}, [f"The run's length and advantages are not known: {error}."]


def _section(
    tree: Mapping[str, object], name: str, kind: type[Section], problems: list[str]
) -> Section | None:
    """One section by itself: a run of another version may differ in one that is not needed."""
    if name not in tree:
        return None
    try:
        return kind.model_validate(tree[name])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *(str(part) for part in first["loc"])])
        problems.append(
            f"config.yaml does not fit this version of Cohort ({where}: {first['msg']}); what "
            f"depends on its section {name} is left out."
        )
        return None


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _curve_notes(drawn: Curves, steps: int) -> list[str]:
    if drawn.steps_per_point == 1:
        return []
    return [
        f"{steps:,} steps are drawn as {len(drawn.steps):,} points: each is the mean of "
        f"{drawn.steps_per_point} steps, and the band behind it spans their extremes."
    ]


def _completion_notes(
    shown: Completions, limits: ReportLimits, algorithm: AlgorithmConfig | None
) -> list[str]:
    if not shown.recorded:
        return ["There are no rollouts: rollouts/ holds no step-*.jsonl."]
    notes = [
        f"Completions: {len(shown.steps):,} of {shown.recorded:,} recorded steps, evenly spread, "
        f"with up to {limits.groups} groups each, evenly spread (--steps, --groups). "
        + (
            f"Besides, up to {limits.prompts} prompts that came at several steps, each at up to "
            f"{limits.visits} of them (--prompts)."
            if limits.prompts
            else "Prompts that came at several steps were not looked for (--prompts 0)."
        )
    ]
    if algorithm is None:
        notes.append("Advantages are not shown: they follow from the config, which is not known.")
    else:
        notes.append(
            "Advantages are computed again from the recorded rewards, as the learner does with "
            f"algorithm.baseline={algorithm.baseline}, algorithm.scale={algorithm.scale} and the "
            "rest of this run's config; rollouts/ does not record them."
        )
        if algorithm.kl_in == "reward" and algorithm.kl_coef > 0:
            notes.append(
                "algorithm.kl_in=reward: the KL that the learner takes off the reward of each "
                "completion is not recorded, and not in the advantages shown."
            )
    if shown.unread:
        notes.append(
            f"{shown.unread:,} lines of the steps shown could not be read and are left out: still "
            "being written, or damaged."
        )
    return notes
