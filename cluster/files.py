"""Atomic writes: a crash leaves the old file or the new one, never a mixture.

Also the check that a folder can be written at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cohort.cluster.errors import RunError
from cohort.learner.checkpoint import nearest_existing


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends; the old one stays when it raises."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        # The disk may be full.
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of `path` by `text`, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def require_writable(folder: Path, what: str, advice: str = "") -> None:
    """Raise RunError unless a file can be made in the folder, or the nearest that is there.

    It leaves nothing behind.

    Args:
        folder: Where something will be written.
        what: What cannot be written otherwise, for the message.
        advice: What to do, for the message.
    """
    place = nearest_existing(folder)
    try:
        # It has no name and vanishes when closed.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        advice = f" ({place}): {advice}" if advice else ""
        raise RunError(f"{what} cannot be written: {error.strerror}{advice}") from error
