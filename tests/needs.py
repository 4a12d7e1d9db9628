"""What some tests need of the machine. Where it is missing they are skipped, but not in CI: what
continuous integration has not tried counts as broken there."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and not IN_CI,
    reason="bubblewrap is not installed (apt-get install bubblewrap)",
)


def package(name: str) -> pytest.MarkDecorator:
    """A package of requirements/cpu.lock that an older virtual environment may lack."""
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None and not IN_CI,
        reason=f"{name} is not installed (make setup)",
    )
