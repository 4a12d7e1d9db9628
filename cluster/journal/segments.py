"""The files of a journal: segment-NNNNNN.log, each a sequence of frames that begins with a head."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cohort.actors.errors import CohortError
from cohort.cluster.journal.format import Bytes, DamagedError, Frame, frame_at, frames
from cohort.cluster.journal.records import (
    GroupRecord,
    Head,
    Label,
    Place,
    Record,
    from_bytes,
    label_of,
)

PATTERN = "segment-*.log"


class JournalError(CohortError):
    """The journal cannot be read or written; the message says where, and what to do."""


def segment_file(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"segment-{number:06d}.log"


def numbers(folder: Path) -> list[int]:
    """The numbers of the segments that are there, in order."""
    return sorted(int(file.stem.removeprefix("segment-")) for file in folder.glob(PATTERN))


@dataclass(frozen=True)
class Segment:
    """What a segment holds, without the groups themselves.

    Attributes:
        number: Its number.
        entries: Label and byte of each record.
        small: The records that are no groups, by their byte.
        end: Where its last whole record ends.
        torn: Bytes behind that, which a kill or a full disk left there.
    """

    number: int
    entries: tuple[tuple[Label, int], ...]
    small: dict[int, Record]
    end: int
    torn: int

    @property
    def last_step(self) -> int:
        """The last step that a record of it belongs to; -1: none."""
        return max((label.step for label, _ in self.entries), default=-1)


@contextmanager
def _contents(file: Path) -> Iterator[Bytes]:
    """A file's bytes, which are not all in memory at once."""
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield mapped


def read_segment(folder: Path, number: int) -> Segment:
    """Read a segment's labels and small records.

    Raises:
        JournalError: A record in its middle is damaged.
    """
    file = segment_file(folder, number)
    entries: list[tuple[Label, int]] = []
    small: dict[int, Record] = {}
    end = 0
    try:
        with _contents(file) as data:
            for found in frames(data):
                tag = label_of(found.payload)
                entries.append((tag, found.offset))
                if tag.kind != GroupRecord.__name__:
                    small[found.offset] = from_bytes(found.payload)
                end = found.end
            size = len(data)
    except DamagedError as error:
        raise damaged(file, error.offset) from error
    return Segment(number, tuple(entries), small, end, size - end)


def damaged(file: Path, offset: int) -> JournalError:
    return JournalError(
        f"{file}: the record at byte {offset} is damaged, and whole ones follow it. Restore the "
        f"file, or move {file.parent} away: run.resume=true then goes on from the last checkpoint "
        "alone"
    )


def read_at(folder: Path, place: Place) -> Record:
    """The record that lies there.

    Raises:
        JournalError: There is no whole one.
    """
    file = segment_file(folder, place.segment)
    try:
        with _contents(file) as data:
            found: Frame | None = frame_at(data, place.offset)
    except FileNotFoundError as error:
        raise JournalError(f"{file} is missing, and it holds groups of a step") from error
    if found is None:
        raise damaged(file, place.offset)
    return from_bytes(found.payload)


def read_group(folder: Path, place: Place) -> GroupRecord:
    """The group that lies there.

    Raises:
        JournalError: There is none, or it is damaged.
    """
    record = read_at(folder, place)
    if not isinstance(record, GroupRecord):
        raise damaged(segment_file(folder, place.segment), place.offset)
    return record


def cut(folder: Path, segment: Segment) -> str:
    """Cut a segment's torn tail off; a line about it for people, empty where there is none."""
    if not segment.torn:
        return ""
    file = segment_file(folder, segment.number)
    with file.open("r+b") as opened:
        opened.truncate(segment.end)
        os.fsync(opened.fileno())
    return (
        f"{file.parent.name}/{file.name}: {segment.torn} bytes after the last whole record, which "
        f"ends at byte {segment.end}, were removed"
    )


def head_of(segment: Segment) -> Head | None:
    """The segment's head; None where not even that is whole."""
    found = segment.small.get(0)
    return found if isinstance(found, Head) else None
