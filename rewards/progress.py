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
    """The same items. what: `reading rows.jsonl`, for example. Quick work prints nothing."""
    began = said = time.monotonic()
    of = "" if total is None else f" of {total:,}"
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if number % EVERY == 0 and time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            _say(f"{what}: {number:,}{of} rows in {said - began:.0f} s")
    if said > began:
        _say(f"{what}: {number:,} rows, done in {time.monotonic() - began:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
