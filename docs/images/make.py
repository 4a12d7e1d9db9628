"""Make the README's pictures from a run: what its terminal showed, and its report.

    cohort train deploy/configs/addition.yaml run.steps=30 > LOG
    python docs/images/make.py runs/addition LOG

Needs Chromium for the report. Writes terminal.svg and report.png beside this file.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from PIL import Image
from rich.console import Console as Recorder
from rich.text import Text

from cohort.cluster.observe.console import Console, duration
from cohort.cluster.observe.metrics_file import read_metrics
from cohort.cluster.observe.report.completions import ReportLimits
from cohort.cluster.observe.report.page import write_report

HERE = Path(__file__).parent
COLUMNS = 100
REPORT_WIDTH, REPORT_HEIGHT = 1160, 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def screen(stream: str) -> list[str]:
    """The lines that a terminal holds after this output of rich's live view; colours are kept."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", stream):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part != "\r" and not re.fullmatch(r"\x1b\[[\d;?]*[hlA-Z]", part):
            lines[row] += part
    return lines


def stages(log: str) -> list[str]:
    """The stages of the start, with the time that each took: what a terminal shows of them."""
    found = [(float(at), what) for at, what in re.findall(r"^\[ *([\d.]+) s\] (.+)", log, re.M)]
    return [f"{what} {duration(after - at)}" for (at, what), (after, _) in pairwise(found)]


def terminal(run: Path, log: str) -> str:
    """An SVG of the terminal after the last step: the start as logged, the steps replayed."""
    metrics = read_metrics(run / "metrics.jsonl")
    stream = io.StringIO()
    os.environ["TERM"] = "xterm-256color"
    with Console(len(metrics), "rich", stream) as console:
        for line in stages(log):
            console.note(line)
        for step in metrics:
            console.step(step)
    recorder = Recorder(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    recorder.print("[bold]$ make train[/bold]")
    for line in screen(stream.getvalue()):
        recorder.print(Text.from_ansi(line), soft_wrap=True)
    svg = recorder.export_svg(title="make train", unique_id="terminal")
    # The font is the reader's own: nothing is fetched from a network.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)


def report(run: Path, out: Path) -> None:
    """A picture of the top of the run's report."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("the picture of the report needs chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(
            run, Path(folder, "report.html"), ReportLimits(), 10.0, datetime.now(UTC)
        )
        shot = Path(folder, "report.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        size = f"--window-size={REPORT_WIDTH},{REPORT_HEIGHT}"
        command = [browser, *flags, size, f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        # A palette makes it a third as large.
        Image.open(shot).convert("RGB").quantize(64).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    svg = terminal(folder, Path(sys.argv[2]).read_text(encoding="utf-8"))
    (HERE / "terminal.svg").write_text(svg, encoding="utf-8")
    report(folder, HERE / "report.png")
