"""What a person sees while a run is going: a live view on a terminal, one line a step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import IO, Literal, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cohort.cluster.observe.metrics_file import PHASES, Metrics, step_of

AVERAGED_STEPS = 10
SPARKLINE_STEPS = 40
BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """`45s`, `2m18s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def number(value: float | None, pattern: str = ".2f") -> str:
    """A number in this format; `-` for one that is missing."""
    return "-" if value is None or value != value else format(value, pattern)


def sparkline(values: Sequence[float]) -> str:
    """One block character a value, from the lowest (▁) to the highest (█)."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BARS[0] * len(values)
    return "".join(BARS[int((v - low) / (high - low) * (len(BARS) - 1))] for v in values)


def time_split(metrics: Metrics) -> str:
    """`4.9 s = generate 1.9 + reward 0.1 + train 2.2 + sync 0.5 + wait 0.2`."""
    parts = " + ".join(f"{name} {number(metrics[f'time/{name}'], '.1f')}" for name in PHASES)
    return f"{number(metrics['time/step'], '.1f')} s = {parts}"


def rewards(metrics: Metrics, average: float | None) -> str:
    """`reward 0.42 (avg10 0.31)`."""
    return f"reward {number(metrics['reward/mean'])} (avg{AVERAGED_STEPS} {number(average)})"


def speed(metrics: Metrics) -> str:
    """`tokens/s 210  kl 0.0020`."""
    return (
        f"tokens/s {number(metrics['rollout/tokens_per_s'], '.0f')}"
        f"  kl {number(metrics['mismatch/k3_kl'], '.4f')}"
    )


def step_line(metrics: Metrics, total: int, average: float | None, eta_s: float | None) -> str:
    """One step on one line.

    Args:
        metrics: Its metrics, see STEP_KEYS.
        total: Steps of the whole run.
        average: Mean reward of the last steps.
        eta_s: Seconds to the end of the run.
    """
    eta = "-" if eta_s is None else duration(eta_s)
    return (
        f"step {step_of(metrics) + 1:>{len(str(total))}}/{total}  {rewards(metrics, average)}"
        f"  {time_split(metrics)}  {speed(metrics)}  eta {eta}"
    )


class _Terminal(RichConsole):
    def on_broken_pipe(self) -> None:
        # rich would raise SystemExit here.
        discard_output(self.file)


def discard_output(stream: IO[str]) -> None:
    """Redirect a stream that nobody reads any more (`| head`, a closed terminal) to /dev/null.

    This holds for everyone who writes to it, the interpreter's own flush at the end included.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)


class Console:
    """Progress of a run, for people. Use it as a context manager.

    Plain output is flushed line by line, so that a log can be followed.

    Args:
        total: Steps of the whole run.
        mode: `auto` is rich on a terminal and plain otherwise (a pipe, a file, a Ray job's log).
        stream: Where to print; standard output by default.

    Example:
        with Console(100) as console:
            console.note("cohort: runs/addition")
            console.stage("starting 1 engine(s)")
            console.step(metrics)
    """

    def __init__(
        self,
        total: int,
        mode: Literal["auto", "rich", "plain"] = "auto",
        stream: TextIO | None = None,
    ) -> None:
        self._total = total
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._rewards: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._seconds: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._history: deque[float] = deque(maxlen=SPARKLINE_STEPS)
        self._last: Metrics | None = None
        self._stage: tuple[str, float] | None = None
        self._live: Live | None = None
        if mode == "rich" or (mode == "auto" and self._stream.isatty()):
            console = _Terminal(
                file=self._stream, force_terminal=True if mode == "rich" else None, highlight=False
            )
            self._live = Live(
                console=console, get_renderable=self._view, refresh_per_second=4, transient=False
            )
            self._live.start()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stage(self, text: str) -> None:
        """Show what start-up (or the end) is busy with, and the seconds it has taken so far."""
        now = time.monotonic()
        if self._live is None:
            self._print(f"[{now - self._started:6.1f} s] {text}")
            return
        self._end_stage()
        self._stage = (text, now)

    def step(self, metrics: Metrics) -> None:
        """Show a finished step; `metrics` has STEP_KEYS."""
        self._end_stage()
        reward, seconds = metrics["reward/mean"], metrics["time/step"]
        # A step without a scored group has no reward; NaN is not equal to itself.
        if reward is not None and reward == reward:
            self._rewards.append(reward)
            self._history.append(reward)
        if seconds is not None:
            self._seconds.append(seconds)
        self._last = metrics
        if self._live is None:
            self._print(step_line(metrics, self._total, self._average(), self._eta_s()))
            return
        try:
            self._live.refresh()
        except OSError:
            discard_output(self._stream)

    def note(self, text: str) -> None:
        """Print something worth a line of its own, or several: a warning, a restart."""
        self._print(text)

    def close(self) -> None:
        """Stop the live view; what it last showed stays on the terminal. May be called twice."""
        self._end_stage()
        if self._live is not None and self._live.is_started:
            try:
                self._live.stop()
            except OSError:
                discard_output(self._stream)

    def _end_stage(self) -> None:
        if self._stage is not None:
            text, since = self._stage
            self._stage = None
            self._print(f"{text} {duration(time.monotonic() - since)}")

    def _print(self, text: str) -> None:
        try:
            if self._live is None:
                print(text, file=self._stream, flush=True)
            else:
                self._live.console.print(Text(text), soft_wrap=True)
        except OSError:
            discard_output(self._stream)

    def _average(self) -> float | None:
        return fmean(self._rewards) if self._rewards else None

    def _eta_s(self) -> float | None:
        if self._last is None or not self._seconds:
            return None
        return fmean(self._seconds) * (self._total - step_of(self._last) - 1)

    def _view(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._last is not None:
            done, eta = step_of(self._last) + 1, self._eta_s()
            row = Table.grid(padding=(0, 2))
            row.add_row(
                f"step {done}/{self._total}",
                ProgressBar(total=self._total, completed=done, width=40),
                f"eta {'-' if eta is None else duration(eta)}",
            )
            lines = [
                row,
                Text(f"{rewards(self._last, self._average())}  {sparkline(self._history)}"),
                Text(time_split(self._last)),
                Text(
                    f"{speed(self._last)}"
                    f"  truncated {number(self._last['rollout/truncated_fraction'], '.0%')}"
                    f"  staleness {number(self._last['async/staleness_mean'], '.1f')}"
                ),
            ]
        # Read once: the refresh thread renders while the main thread ends a stage.
        stage = self._stage
        if stage is not None:
            text, since = stage
            elapsed = duration(time.monotonic() - since)
            lines.append(Spinner("dots", Text(f"{text} {elapsed}")))
        return Group(*lines)
