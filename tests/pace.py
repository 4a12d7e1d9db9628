"""Which of many cases `make test-fast` runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], one_in: int) -> list[Any]:
    """All of them, but of each so many all but the first are marked slow."""
    return [
        value if n % one_in == 0 else pytest.param(value, marks=pytest.mark.slow)
        for n, value in enumerate(values)
    ]
