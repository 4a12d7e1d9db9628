"""The page: one HTML file with its data, style and script inside, which loads nothing.

Completions are untrusted text. They reach the page as JSON without a single `<`, the script shows
them as text nodes, and the page's own policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from importlib import resources
from pathlib import Path

from cohort.cluster.files import write_atomically
from cohort.cluster.observe.report.build import Report, ReportError, build
from cohort.cluster.observe.report.completions import ReportLimits
from cohort.cluster.observe.report.recorded import LONGEST_TEXT, Text, shorten

# One after the other, they are the script of the page.
SCRIPTS = ("charts.js", "page.js")
# A page that cannot keep this much of each text is not worth looking at.
SHORTEST_TEXT = 200


def write_report(
    run_dir: Path, out: Path | None, limits: ReportLimits, max_mb: float, now: datetime
) -> Path:
    """Write the page of a run.

    Args:
        run_dir: The run directory, finished or still growing.
        out: The file to write; report.html in the run directory by default.
        limits: How many completions are shown.
        max_mb: Largest size of the page, in 1e6 bytes; long texts lose their middle to fit.
        now: What the page says of when it was made.

    Returns:
        The file that was written.

    Raises:
        ReportError: run_dir is not a run directory, its metrics are damaged, or the page cannot be
            made to fit or cannot be written.
    """
    page = render(build(run_dir, limits, now), int(max_mb * 1e6))
    target = out if out is not None else run_dir / "report.html"
    if target.is_dir():
        raise ReportError(f"cannot write {target}: it is a folder; name a file with --out")
    try:
        write_atomically(target, page)
    except OSError as error:
        raise ReportError(
            f"cannot write {target} ({error.strerror}): name another file with --out"
        ) from error
    return target


def render(report: Report, max_bytes: int) -> str:
    """The page, of at most `max_bytes` in UTF-8: texts are shortened until it fits.

    Raises:
        ReportError: They would have to be shorter than SHORTEST_TEXT.
    """
    limit = LONGEST_TEXT
    while True:
        page = _page(report, limit)
        size = len(page.encode())
        if size <= max_bytes:
            return page
        if limit == SHORTEST_TEXT:
            raise ReportError(
                f"the page would have {size / 1e6:.1f} MB with texts shortened to {SHORTEST_TEXT} "
                "characters: lower --steps, --groups or --prompts, or raise --max-mb "
                f"(now {max_bytes / 1e6:g})"
            )
        limit = max(SHORTEST_TEXT, limit * 2 // 3)


def _page(report: Report, limit: int) -> str:
    if limit < LONGEST_TEXT:
        note = f"Texts are shortened to {limit:,} characters (--max-mb)."
        report = replace(report, notes=(*report.notes, note))
    data = json.dumps(_plain(report, limit), allow_nan=False, separators=(",", ":"))
    script = "\n".join(map(_asset, SCRIPTS))
    parts = {
        # The name of a folder may hold what UTF-8 cannot.
        "title": html.escape(report.run.name).encode("ascii", "xmlcharrefreplace").decode(),
        "style": _asset("page.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # Nothing in it can end the script element, or begin a comment or a tag.
        "data": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    # In one pass, so that what is filled in is never filled in again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (resources.files("cohort.cluster.observe.report") / name).read_text(encoding="utf-8")


def _plain(value: object, limit: int) -> object:
    """Dataclasses as JSON, texts shortened to `limit` characters, numbers to six digits."""
    if isinstance(value, Text):
        text = shorten(value, limit)
        return [text.head, text.left_out, text.tail] if text.left_out else text.head
    if is_dataclass(value):
        return {f.name: _plain(value.__dict__[f.name], limit) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item, limit) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
