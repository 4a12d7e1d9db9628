"""metrics.jsonl: what every row holds, and how rows are read, appended and moved aside."""

from __future__ import annotations

import errno
import json
import logging
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import SupportsFloat

from cohort.cluster.files import write_atomically
from cohort.learner.aside import Aside

logger = logging.getLogger(__name__)

STEP_KEYS = (
    "step",
    "reward/mean",
    "reward/std",
    "reward/zero_variance_fraction",
    "reward/error_rate",
    "rollout/completion_tokens",
    "rollout/tokens_per_s",
    "rollout/truncated_fraction",
    "learner/loss",
    "learner/grad_norm",
    "learner/entropy",
    "learner/clip_fraction",
    "learner/tokens_per_s",
    "learner/skipped_steps",
    "mismatch/k3_kl",
    "mismatch/logprob_abs_max",
    "async/staleness_mean",
    "async/staleness_max",
    "weights/version",
    "time/step",
    "time/generate",
    "time/reward",
    "time/train",
    "time/sync",
    "time/wait",
    "time/reward_p50",
    "time/reward_p99",
    "time/reward_max",
    "samples/admitted",
    "samples/trained",
    "samples/filtered",
    "samples/failed",
)
"""Keys of every row of metrics.jsonl. `step` counts from 0; `time/*` are seconds of one step.

`time/reward_p50`, `_p99` and `_max` are over the completions of the step: how long the calls that
scored each one took. The other times are the step's, and add up to `time/step`.
"""

PHASES = ("generate", "reward", "train", "sync", "wait")
"""The parts of `time/step`, each with its `time/PHASE`."""

MetricRow = dict[str, float | None]
"""A row of metrics.jsonl: finite numbers, None for what is missing or not finite."""


Metrics = Mapping[str, float | None]
"""The metrics of a step as others read them."""


def step_of(metrics: Metrics) -> int:
    """The step that a row is of, counted from 0."""
    return int(metrics["step"] or 0)


def plain(name: str, value: SupportsFloat | None) -> float | None:
    """Convert a metric to what JSON holds: an int, a finite float, or None.

    Raises:
        ValueError: The value is not a number; the message names the metric.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name} is not a number: {value!r}") from error
    return number if math.isfinite(number) else None


def step_row(metrics: Mapping[str, SupportsFloat | None]) -> MetricRow:
    """The row of one step: STEP_KEYS first, then all other keys by name.

    Raises:
        ValueError: A key of STEP_KEYS is missing, or a value is not a number.
    """
    missing = [key for key in STEP_KEYS if key not in metrics]
    if missing:
        raise ValueError(f"metrics of a step lack {', '.join(missing)}")
    extra = sorted(set(metrics) - set(STEP_KEYS))
    return {key: plain(key, metrics[key]) for key in (*STEP_KEYS, *extra)}


def read_metrics(path: Path) -> list[MetricRow]:
    """The rows of a metrics.jsonl; a last line torn by a crash is left out.

    Raises:
        ValueError: Another line is not JSON or has no step; the message names it.
    """
    return [row for _, row in _read_lines(path) if row is not None]


def _read_lines(path: Path) -> Iterator[tuple[str, MetricRow | None]]:
    """Each line with its end and its row; None for a torn last line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            yield line, None
            return
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"{path} line {number} has no step")
        yield line, row


class MetricsFile:
    """metrics.jsonl of a run, open for appending.

    Args:
        path: The file; made when it does not exist.
        first_step: The first step that will be added. Rows from there on belong to work that will
            be done again: they are moved aside.
        aside: Where they are moved.

    Attributes:
        unwritten: Lines that are not in the file yet; `write` tries them again.

    Raises:
        ValueError: The file is damaged, see `read_metrics`.
    """

    def __init__(self, path: Path, first_step: int, aside: Aside) -> None:
        self._last_step = _keep_before(path, first_step, aside)
        # Without a buffer: what could not be written must not be written later by chance.
        self._file = path.open("ab", buffering=0)
        self.unwritten: list[str] = []

    def add(self, row: MetricRow) -> None:
        """Take a row for the next `write`.

        Raises:
            ValueError: Its step is not above the last one.
        """
        step = row["step"]
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"step {step} does not follow step {self._last_step}")
        self._last_step = step
        self.unwritten.append(json.dumps(row) + "\n")

    def write(self) -> None:
        """Write every row that is not in the file yet, or none of them; on disk on return.

        Raises:
            OSError: The file cannot be written.
        """
        size = os.fstat(self._file.fileno()).st_size
        text = "".join(self.unwritten).encode()
        try:
            if (written := self._file.write(text)) != len(text):
                raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were written")
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise
        self.unwritten.clear()

    def close(self) -> None:
        """Try a last time to write what is not written, and close. May be called twice."""
        if self._file.closed:
            return
        try:
            if self.unwritten:
                self.write()
        except OSError as error:
            logger.warning(
                "the metrics of the last %d steps could not be written: %s",
                len(self.unwritten),
                error,
            )
        self._file.close()


def _keep_before(path: Path, first_step: int, aside: Aside) -> int:
    """Leave the rows of steps before `first_step` in the file; returns the last of them, or -1."""
    kept: dict[int, str] = {}
    others = []
    for line, row in _read_lines(path):
        step = first_step if row is None else step_of(row)
        if step < first_step:
            others += [kept[step]] if step in kept else []
            kept[step] = line.rstrip("\n") + "\n"
        else:
            others.append(line)
    if others:
        aside.write(path.name, "".join(others))
    write_atomically(path, "".join(kept.values()))
    return max(kept, default=-1)
