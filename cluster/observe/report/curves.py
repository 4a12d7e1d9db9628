"""Curves, charts and headline numbers, from the rows of metrics.jsonl. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from cohort.cluster.observe.metrics_file import PHASES, Metrics, step_of

MAX_POINTS = 500
"""A longer run is shown in parts of equally many steps, each as one point."""
RECENT_STEPS = 10

Rows = Sequence[Metrics]


@dataclass(frozen=True)
class Series:
    """One metric, a value a point; None where no step has it.

    low, high: extremes of the steps of a point; empty when every point is one step.
    """

    key: str
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """steps: the step of each point, the middle one of `steps_per_point`."""

    steps: tuple[int, ...]
    steps_per_point: int
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Line:
    """A series in a chart, and what it is called there."""

    key: str
    label: str


@dataclass(frozen=True)
class Chart:
    """Some lines over the steps, in one unit; fractions are shown in percent, from 0 to 100."""

    section: str
    title: str
    unit: str
    hint: str
    lines: tuple[Line, ...]
    kind: Literal["line", "stack"] = "line"
    wide: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline number with its unit, and a line that puts it in place."""

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


# Metrics below reward/ that are not the mean of a reward function.
OF_ALL_REWARDS = {
    "reward/mean",
    "reward/std",
    "reward/zero_variance_fraction",
    "reward/error_rate",
}

CHARTS = (
    Chart(
        "Reward",
        "Mean reward",
        "",
        "weighted total, mean over all completions of a step",
        (Line("reward/mean", "mean"),),
        wide=True,
    ),
    Chart(
        "Signal and length",
        "Groups without signal",
        "%",
        "zero variance: equal rewards",
        (Line("reward/zero_variance_fraction", "fraction of groups"),),
    ),
    Chart(
        "Signal and length",
        "Spread of rewards",
        "",
        "std over all completions of a step",
        (Line("reward/std", "std"),),
    ),
    Chart(
        "Signal and length",
        "Completion length",
        "tokens",
        "mean of a step",
        (Line("rollout/completion_tokens", "mean"),),
    ),
    Chart(
        "Signal and length",
        "Truncated completions",
        "%",
        "stopped at actors.max_tokens",
        (Line("rollout/truncated_fraction", "fraction"),),
    ),
    Chart(
        "Signal and length",
        "Failed completions",
        "%",
        "lost or without a score",
        (Line("reward/error_rate", "fraction"),),
    ),
    Chart(
        "Time",
        "Where the time of a step goes",
        "s",
        "with actors.max_staleness above 0, phases overlap and add up to more than the step",
        tuple(Line(f"time/{phase}", phase) for phase in PHASES),
        kind="stack",
        wide=True,
    ),
    Chart("Time", "Step", "s", "wall clock", (Line("time/step", "step"),)),
    Chart("Time", "Scoring", "s", "wall clock of the reward functions", (Line("time/reward", ""),)),
    Chart(
        "Time",
        "Generation speed",
        "tokens/s",
        "completion tokens, all engines",
        (Line("rollout/tokens_per_s", "generation"),),
    ),
    Chart(
        "Time",
        "Learner speed",
        "tokens/s",
        "trained tokens",
        (Line("learner/tokens_per_s", "learner"),),
    ),
    Chart("Learner", "Loss", "", "", (Line("learner/loss", "loss"),)),
    Chart(
        "Learner",
        "Gradient norm",
        "",
        "before clipping",
        (Line("learner/grad_norm", "norm"),),
    ),
    Chart("Learner", "Entropy", "nats", "mean per token", (Line("learner/entropy", "entropy"),)),
    Chart(
        "Learner",
        "Engine against learner",
        "nats",
        "k3 KL of their log-probs, per token",
        (Line("mismatch/k3_kl", "k3"),),
    ),
)


def choose_charts(keys: Sequence[str]) -> tuple[Chart, ...]:
    """The charts for these metrics: a fixed set, one a reward function, and one for each other."""
    present = set(keys)
    fixed = [
        chart for chart in CHARTS if any(line.key in present for line in chart.lines)
    ]  # older runs lack some
    latencies = [key for key in keys if "latency" in key]
    functions = [
        key
        for key in keys
        if key.startswith("reward/") and key not in OF_ALL_REWARDS and key not in latencies
    ]
    shown = {line.key for chart in fixed for line in chart.lines} | {*latencies, *functions}
    return (
        *[chart for chart in fixed if chart.section == "Reward"],
        *[
            Chart("Reward", key.removeprefix("reward/"), "", "mean, unweighted", (Line(key, ""),))
            for key in functions
        ],
        *[chart for chart in fixed if chart.section in ("Signal and length", "Time")],
        *[Chart("Time", key, "s", "", (Line(key, ""),)) for key in latencies],
        *[chart for chart in fixed if chart.section == "Learner"],
        *[
            Chart("Other metrics", key, "", "", (Line(key, ""),))
            for key in keys
            if key not in shown
        ],
    )


def _mean(rows: Rows, key: str) -> float | None:
    values = [value for row in rows if (value := numeric(row, key)) is not None]
    return fmean(values) if values else None


def _shown(value: float | None, pattern: str, unit: str = "") -> str:
    return "–" if value is None else f"{format(value, pattern)} {unit}".rstrip()


def tiles(rows: Rows, max_tokens: int | None) -> tuple[Tile, ...]:
    """The headline numbers: means over the last RECENT_STEPS steps, counts over the whole run."""
    if not rows:
        return ()
    first, recent = rows[:RECENT_STEPS], rows[-RECENT_STEPS:]
    limit = "" if max_tokens is None else f"; limit {max_tokens:,}"
    split = " · ".join(
        f"{phase} {_shown(_mean(recent, f'time/{phase}'), '.1f')}" for phase in PHASES
    )
    speed = _shown(_mean(recent, "rollout/tokens_per_s"), ",.0f", "tokens/s generated")
    counts = {
        name: _shown(numeric(rows[-1], f"samples/{name}"), ",.0f")
        for name in ("trained", "filtered", "failed")
    }
    zero, truncated = "reward/zero_variance_fraction", "rollout/truncated_fraction"
    then = f"last {len(recent)} steps; first {len(first)}: "
    return (
        Tile(
            "Reward",
            _shown(_mean(recent, "reward/mean"), ".3f"),
            then + _shown(_mean(first, "reward/mean"), ".3f"),
        ),
        Tile(
            "Groups without signal",
            _shown(_mean(recent, zero), ".0%"),
            then + _shown(_mean(first, zero), ".0%"),
        ),
        Tile(
            "Completion length",
            _shown(_mean(recent, "rollout/completion_tokens"), ",.1f", "tokens"),
            f"last {len(recent)} steps{limit}",
        ),
        Tile(
            "Truncated",
            _shown(_mean(recent, truncated), ".0%"),
            then + _shown(_mean(first, truncated), ".0%"),
        ),
        Tile("Step", _shown(_mean(recent, "time/step"), ",.1f", "s"), f"{split} s"),
        Tile(
            "Trained completions",
            counts["trained"],
            f"{counts['filtered']} filtered · {counts['failed']} failed · {speed}",
        ),
    )
