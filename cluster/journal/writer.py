"""Appends records to a journal's newest segment."""

from __future__ import annotations

import io
import os
from pathlib import Path

from cohort.cluster.journal.format import frame
from cohort.cluster.journal.records import Head, Place, Record, label, to_bytes
from cohort.cluster.journal.segments import numbers, read_segment, segment_file

# A segment that is larger is followed by another: only whole ones are removed.
SEGMENT_BYTES = 64 << 20


class JournalWriter:
    """One writer of a folder. It begins a segment of its own, and touches no older one.

    A record that could not be written whole leaves nothing: the segment is cut back to the one
    before it, so that a disk with room again goes on where it was.

    Args:
        folder: Made if needed.
        head: The first record of every segment.
        segment_bytes: See SEGMENT_BYTES.

    Attributes:
        sizes: Bytes of every segment that is there, by its number.
        last_steps: The last step that each has a record of.
    """

    def __init__(self, folder: Path, head: Head, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._head = head
        self._segment_bytes = segment_bytes
        self._file: io.FileIO | None = None
        self.sizes: dict[int, int] = {}
        self.last_steps: dict[int, int] = {}
        for number in numbers(folder):
            found = read_segment(folder, number)
            self.sizes[number], self.last_steps[number] = found.end, found.last_step
            _sync(segment_file(folder, number))
        self._begin(max(self.sizes, default=0) + 1)

    def _begin(self, number: int) -> None:
        """Begin a segment; where that fails, the one before stays the newest."""
        path = segment_file(self._folder, number)
        file = io.FileIO(path, "x")
        self.close()
        self._file, self._number, self._end = file, number, 0
        self.sizes[number], self.last_steps[number] = 0, -1
        _sync(self._folder)
        self.append(self._head)

    def append(self, record: Record) -> Place:
        """Write a record behind the others; not yet on the disk, see `sync`.

        Raises:
            OSError: It could not be written, and is not there.
        """
        if not isinstance(record, Head):
            if self._end > self._segment_bytes:
                self.rotate()
            if not self._end:
                # The head found no room before.
                self.append(self._head)
        left = memoryview(frame(to_bytes(record)))
        place, end = Place(self._number, self._end), self._end
        try:
            while left:
                written = os.pwrite(self._descriptor, left, end)
                left, end = left[written:], end + written
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end = self.sizes[self._number] = end
        known = self.last_steps[self._number]
        self.last_steps[self._number] = max(known, label(record).step)
        return place

    def sync(self) -> None:
        """Return when all that was appended is on the disk. Raises OSError when it cannot be."""
        os.fsync(self._descriptor)

    def rotate(self) -> None:
        """Go on in a new segment."""
        self.sync()
        self._begin(self._number + 1)

    def remove(self, number: int) -> None:
        """Remove an older segment."""
        segment_file(self._folder, number).unlink(missing_ok=True)
        del self.sizes[number], self.last_steps[number]

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise ValueError("the journal is closed")
        return self._file.fileno()

    @property
    def current(self) -> int:
        """The number of the segment that is being written."""
        return self._number


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
