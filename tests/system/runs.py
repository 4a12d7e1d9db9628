"""Reading what a run left in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    """The completions of a step."""
    text = (run / "rollouts" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
