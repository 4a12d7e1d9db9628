"""Means and quantiles of values some of which may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are not None; NaN without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that is not below `fraction` of the values; NaN without any."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)] if values else math.nan
