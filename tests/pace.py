"""Which of many cases `make test-fast`, `make test` and `make exhaustive` run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], fast: int, slow: int = 1) -> list[Any]:
    """All of them: one in `fast` as it is, one in `slow` marked slow, the others exhaustive."""
    found = []
    for n, value in enumerate(values):
        mark = pytest.mark.slow if n % slow == 0 else pytest.mark.exhaustive
        found.append(value if n % fast == 0 else pytest.param(value, marks=mark))
    return found
