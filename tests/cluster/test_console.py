"""What a person sees: one line a step, or a live view."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cohort.cluster.observe.console import Console, duration, number, sparkline, step_line
from cohort.cluster.observe.metrics_file import STEP_KEYS


def metrics_of(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(STEP_KEYS, 0.0)
    values |= {
        "step": step,
        "reward/mean": 0.42,
        "rollout/tokens_per_s": 210.4,
        "mismatch/k3_kl": 0.002,
        "time/step": 4.9,
        "time/generate": 1.9,
        "time/reward": 0.1,
        "time/train": 2.2,
        "time/sync": 0.5,
        "time/wait": 0.2,
    }
    return {**values, **changes}


class Stream(io.StringIO):
    """A stream that says whether it is a terminal and counts its flushes."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.flushes = 0

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def visible(text: str) -> str:
    """The text without the escape sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_step_line() -> None:
    assert step_line(metrics_of(11), total=40, average=0.31, eta_s=138) == (
        "step 12/40  reward 0.42 (avg10 0.31)"
        "  4.9 s = generate 1.9 + reward 0.1 + train 2.2 + sync 0.5 + wait 0.2"
        "  tokens/s 210  kl 0.0020  eta 2m18s"
    )


def test_step_line_without_numbers() -> None:
    line = step_line(
        metrics_of(0, **{"reward/mean": None, "mismatch/k3_kl": float("nan")}), 100, None, None
    )
    assert line.startswith("step   1/100  reward - (avg10 -)")
    assert line.endswith("kl -  eta -")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (138, "2m18s"), (11100, "3h05m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_number() -> None:
    assert [number(v, ".2f") for v in (0.005, None, float("nan"))] == ["0.01", "-", "-"]


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([]) == ""


def test_plain_output_is_one_flushed_line_each() -> None:
    stream = Stream(terminal=False)
    with Console(3, "auto", stream) as console:
        console.note("cohort\n  run  steps=3")
        console.stage("starting 1 engine ...")
        flushed = stream.flushes
        for step in range(3):
            console.step(metrics_of(step, **{"reward/mean": step / 2}))
            assert stream.flushes > flushed
            flushed = stream.flushes
        console.note("saved checkpoint 3")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["cohort", "  run  steps=3"]
    assert re.fullmatch(r"\[ +\d+\.\d s\] starting 1 engine \.\.\.", lines[2])
    assert [line[:8] for line in lines[3:6]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "reward 1.00 (avg10 0.50)" in lines[5]
    assert lines[3].endswith("eta 10s")
    assert lines[5].endswith("eta 0s")
    assert lines[6:] == ["saved checkpoint 3"]
    assert "\x1b" not in stream.getvalue()


def test_average_spans_ten_steps_and_skips_missing_rewards() -> None:
    stream = Stream(terminal=False)
    with Console(30, "plain", stream) as console:
        console.step(metrics_of(0, **{"reward/mean": 100.0}))
        console.step(metrics_of(1, **{"reward/mean": None}))
        console.step(metrics_of(2, **{"reward/mean": float("nan")}))
        for step in range(3, 13):
            console.step(metrics_of(step, **{"reward/mean": 1.0}))
    lines = stream.getvalue().splitlines()
    assert "reward - (avg10 100.00)" in lines[2]
    assert "(avg10 50.50)" in lines[3]
    assert "(avg10 1.00)" in lines[-1]


def test_resumed_run_counts_from_where_it_is() -> None:
    stream = Stream(terminal=False)
    with Console(40, "plain", stream) as console:
        console.step(metrics_of(29))
    assert stream.getvalue().startswith("step 30/40")
    assert stream.getvalue().strip().endswith("eta 49s")


def test_a_terminal_gets_the_live_view() -> None:
    stream = Stream(terminal=True)
    with Console(40, "auto", stream) as console:
        console.stage("starting 1 engine ...")
        console.step(metrics_of(10, **{"reward/mean": 0.2}))
        console.step(metrics_of(11))
        console.note("actor 1 restarted")
    shown = visible(stream.getvalue())
    assert "\x1b" in stream.getvalue()
    assert re.search(r"starting 1 engine \.\.\. \d+s", shown)
    assert "step 12/40" in shown
    assert "reward 0.42 (avg10 0.31)  ▁█" in shown
    assert "4.9 s = generate 1.9 + reward 0.1 + train 2.2 + sync 0.5 + wait 0.2" in shown
    assert "actor 1 restarted" in shown
    # The cursor is given back.
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_modes_can_be_forced() -> None:
    forced = Stream(terminal=False)
    with Console(2, "rich", forced) as console:
        console.step(metrics_of(0))
    assert "\x1b" in forced.getvalue()
    plain = Stream(terminal=True)
    with Console(2, "plain", plain) as console:
        console.step(metrics_of(0))
    assert "\x1b" not in plain.getvalue()


def test_markup_in_text_is_shown_as_it_is() -> None:
    stream = Stream(terminal=True)
    with Console(2, "rich", stream) as console:
        console.note("reward [bold]x[/bold] raised [/nope]")
    assert "reward [bold]x[/bold] raised [/nope]" in visible(stream.getvalue())


def test_an_error_passes_and_the_terminal_is_restored() -> None:
    stream = Stream(terminal=True)
    with pytest.raises(RuntimeError, match="boom"), Console(2, "rich", stream) as console:
        console.stage("starting")
        raise RuntimeError("boom")
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
    console.close()


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_a_pipe_that_nobody_reads_ends_nothing(mode: str) -> None:
    """As with `cohort train ... | head -1`; the interpreter's own flush at the end counts, too."""
    program = f"""
import os, signal, sys, time
from cohort.cluster.observe.console import Console
sys.stdin.readline()
with Console(3, {mode!r}) as console:
    for number in range(50):
        console.note("x" * 5000)
        console.stage("saving")
    print("more")
sys.exit(7)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None and process.stdin is not None
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(60) == 7
    assert process.stderr is not None
    assert "Error" not in process.stderr.read()
