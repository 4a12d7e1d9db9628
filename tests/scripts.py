"""The scripts of examples/, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ask_for_a_trip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run examples/travel/ask_for_a_trip.py to its end; output is captured."""
    return subprocess.run(
        [sys.executable, "examples/travel/ask_for_a_trip.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
