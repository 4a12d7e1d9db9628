"""What this process has open."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections import Counter
from pathlib import Path


def open_files(sockets: bool = True) -> Counter[str]:
    """What the descriptors lead to, without the numbers in its name, and how many lead there.

    sockets: whether they count. Ray's threads, if a test before has started it in this process, go
    on connecting to each other.

    `open_files() - before` is what was left open since `before`. Fewer than before is no fault:
    what somebody else has forgotten may be closed at any time.
    """
    gc.collect()
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(entry)
            if sockets or not name.startswith("socket:"):
                found[re.sub(r"\d+", "N", name)] += 1
    return found
