"""Curves, charts and headline numbers, from the rows of metrics.jsonl. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from cohort.cluster.observe.metrics_file import PHASES, Metrics, step_of
from cohort.cluster.observe.stats import mean

MAX_POINTS = 500
"""A longer run is shown in parts of equally many steps, each as one point."""
RECENT_STEPS = 10

Rows = Sequence[Metrics]


@dataclass(frozen=True)
class Series:
    """One metric, a value a point; None where no step has it.

    `low` and `high` are the extremes of the steps of a point; empty when every point is one step.
    """

    key: str
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """All metrics at the same points; `steps` has the middle one of each point's steps."""

    steps: tuple[int, ...]
    steps_per_point: int
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Chart:
    """Some metrics over the steps, in one unit; several are stacked.

    A unit of % is for fractions, which are shown from 0 to 100 %.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str = ""
    hint: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline number with its unit, and a line that explains it."""

    label: str
    value: str
    detail: str


def numeric(row: Metrics, key: str) -> float | None:
    """The metric as a finite number, else None: the file is not checked for what rows hold."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def curves(rows: Rows) -> Curves:
    """Every metric of the rows (one a step, in order) as at most MAX_POINTS points."""
    size = max(1, -(-len(rows) // MAX_POINTS))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    keys = sorted({key for row in rows for key in row} - {"step"})
    series = []
    for key in keys:
        points = [[v for row in part if (v := numeric(row, key)) is not None] for part in parts]
        if any(points):
            series.append(
                Series(
                    key,
                    mean=tuple(fmean(p) if p else None for p in points),
                    low=tuple(min(p, default=None) for p in points) if size > 1 else (),
                    high=tuple(max(p, default=None) for p in points) if size > 1 else (),
                )
            )
    return Curves(tuple(step_of(part[len(part) // 2]) for part in parts), size, tuple(series))


REWARD, SIGNAL, TIME, LEARNER = "Reward", "Signal and length", "Time", "Learner"
OVERLAP = "with actors.max_staleness above 0, phases overlap and add up to more than the step"
CHARTS = (
    Chart(
        REWARD, "Mean reward", ("reward/mean",),
        hint="weighted total, mean over all completions of a step", wide=True,
    ),
    Chart(
        SIGNAL, "Groups without signal", ("reward/zero_variance_fraction",), "%",
        "zero variance: equal rewards",
    ),
    Chart(
        SIGNAL, "Spread of rewards", ("reward/std",), hint="std over all completions of a step"
    ),
    Chart(SIGNAL, "Completion length", ("rollout/completion_tokens",), "tokens", "mean of a step"),
    Chart(
        SIGNAL, "Truncated completions", ("rollout/truncated_fraction",), "%",
        "stopped at actors.max_tokens",
    ),
    Chart(SIGNAL, "Failed completions", ("reward/error_rate",), "%", "lost or without a score"),
    Chart(
        TIME, "Where the time of a step goes", tuple(f"time/{phase}" for phase in PHASES), "s",
        OVERLAP, wide=True,
    ),
    Chart(TIME, "Step", ("time/step",), "s", "wall clock"),
    Chart(TIME, "Scoring", ("time/reward",), "s", "wall clock of the reward functions"),
    Chart(
        TIME, "Generation speed", ("rollout/tokens_per_s",), "tokens/s",
        "completion tokens, all engines",
    ),
    Chart(TIME, "Learner speed", ("learner/tokens_per_s",), "tokens/s", "trained tokens"),
    Chart(LEARNER, "Loss", ("learner/loss",)),
    Chart(LEARNER, "Gradient norm", ("learner/grad_norm",), hint="before clipping"),
    Chart(LEARNER, "Entropy", ("learner/entropy",), "nats", "mean per token"),
    Chart(
        LEARNER, "Engine against learner", ("mismatch/k3_kl",), "nats",
        "k3 KL of their log-probs, per token",
    ),
)  # fmt: skip


def choose_charts(keys: Sequence[str]) -> tuple[Chart, ...]:
    """The charts for these metrics: a fixed set, one a reward function, and one for each other."""
    # Older runs lack some.
    fixed = [chart for chart in CHARTS if set(chart.keys) & set(keys)]
    others = [key for key in keys if not any(key in chart.keys for chart in fixed)]
    latencies = [key for key in others if "latency" in key]
    functions = [key for key in others if key.startswith("reward/") and key not in latencies]
    rest = [key for key in others if key not in latencies and key not in functions]
    return (
        *[chart for chart in fixed if chart.section == REWARD],
        *[
            Chart(REWARD, key.removeprefix("reward/"), (key,), hint="mean, unweighted")
            for key in functions
        ],
        *[chart for chart in fixed if chart.section in (SIGNAL, TIME)],
        *[Chart(TIME, key, (key,), "s") for key in latencies],
        *[chart for chart in fixed if chart.section == LEARNER],
        *[Chart("Other metrics", key, (key,)) for key in rest],
    )


def _shown(rows: Rows, key: str, pattern: str, unit: str = "") -> str:
    """The mean of a metric over these rows, as a text."""
    value = mean(numeric(row, key) for row in rows)
    return "–" if math.isnan(value) else f"{format(value, pattern)} {unit}".rstrip()


def tiles(rows: Rows, max_tokens: int | None) -> tuple[Tile, ...]:
    """The headline numbers: means over the last RECENT_STEPS steps, counts over the whole run."""
    if not rows:
        return ()
    first, recent = rows[:RECENT_STEPS], rows[-RECENT_STEPS:]

    def then_and_now(label: str, key: str, pattern: str) -> Tile:
        before = f"last {len(recent)} steps; first {len(first)}: {_shown(first, key, pattern)}"
        return Tile(label, _shown(recent, key, pattern), before)

    limit = "" if max_tokens is None else f"; limit {max_tokens:,}"
    split = " · ".join(f"{phase} {_shown(recent, f'time/{phase}', '.1f')}" for phase in PHASES)
    speed = _shown(recent, "rollout/tokens_per_s", ",.0f", "tokens/s generated")
    trained, filtered, failed = (
        _shown(rows[-1:], f"samples/{name}", ",.0f") for name in ("trained", "filtered", "failed")
    )
    return (
        then_and_now("Reward", "reward/mean", ".3f"),
        then_and_now("Groups without signal", "reward/zero_variance_fraction", ".0%"),
        Tile(
            "Completion length",
            _shown(recent, "rollout/completion_tokens", ",.1f", "tokens"),
            f"last {len(recent)} steps{limit}",
        ),
        then_and_now("Truncated", "rollout/truncated_fraction", ".0%"),
        Tile("Step", _shown(recent, "time/step", ",.1f", "s"), f"{split} s"),
        Tile("Trained completions", trained, f"{filtered} filtered · {failed} failed · {speed}"),
    )
