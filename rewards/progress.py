"""Lines on stderr for work that takes long: how far it is, every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

PROGRESS_S = 5.0
# The clock is looked at once for so many items.
EVERY = 500

T = TypeVar("T")


def with_progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same items; prints how far they are every few seconds. Quick work prints nothing.

    Args:
        items: Rows.
        what: For the lines, like `reading rows.jsonl`.
        total: How many there are, if that is known.
    """
    began = printed = time.monotonic()
    of = "" if total is None else f" of {total:,}"
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if number % EVERY == 0 and time.monotonic() - printed > PROGRESS_S:
            printed = time.monotonic()
            _print(f"{what}: {number:,}{of} rows in {printed - began:.0f} s")
    if printed > began:
        _print(f"{what}: {number:,} rows, done in {time.monotonic() - began:.0f} s")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
