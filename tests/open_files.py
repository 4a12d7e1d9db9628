"""What this process has open."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from pathlib import Path


def open_files() -> Counter[str]:
    """What the descriptors lead to, and how many lead there.

    `open_files() - before` is what was left open since `before`. A plain number would not do: one
    that somebody before has forgotten may be closed at any time, and hide one that is left.
    """
    gc.collect()
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[os.readlink(entry)] += 1
    return found
