"""The process that writes the journal, on the driver's machine; no completion passes the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cohort.actors.records import GroupMeta, GroupRef, ScoredGroup, ScoreMeta
from cohort.cluster.journal.records import GroupRecord, Head, Place, StepRecord, WeightsRecord
from cohort.cluster.journal.retention import removable
from cohort.cluster.journal.segments import JournalError
from cohort.cluster.journal.writer import JournalWriter


@dataclass(frozen=True)
class NotWritten:
    """Why a record is not in the journal. lost: the group's object is gone; else the disk."""

    kind: Literal["lost", "disk"]
    message: str


@dataclass(frozen=True)
class Limits:
    """How much of the past is kept: `run.journal_gb` in bytes, and `run.keep_journal`."""

    limit_bytes: int
    keep_all: bool


class JournalActor:
    """Writes records in the order of the calls. What fails is a value: the actor goes on.

    Args:
        folder: journal/ of the run.
        head: Of every segment.
        limits: See `Limits`.
    """

    def __init__(self, folder: str, head: Head, limits: Limits) -> None:
        self._folder = Path(folder)
        self._head = head
        self._limits = limits
        # Begun with the first record, so that a disk without room is a value as well.
        self._writer: JournalWriter | None = None

    def put_group(
        self, step: int, seed: int, meta: GroupMeta, scores: ScoreMeta, group: Sequence[GroupRef]
    ) -> Place | NotWritten:
        """Write a scored group.

        Args:
            step: That it is for.
            seed: Of the group.
            meta: Its sizes and versions.
            scores: Its rewards.
            group: Its reference, in a list so that it arrives as a reference.
        """
        import ray
        from ray.exceptions import RayError

        (ref,) = group
        try:
            scored = ref if isinstance(ref, ScoredGroup) else ray.get(ref)
        except RayError as error:
            return NotWritten("lost", f"{type(error).__name__}: {error}")
        try:
            return self._begun().append(GroupRecord(step, seed, meta, scores, scored))
        except (OSError, JournalError) as error:
            return NotWritten("disk", str(error))

    def put_step(self, record: StepRecord) -> int | NotWritten:
        """Write what a step is about to train, and wait until all is on the disk.

        Returns:
            Bytes of the whole journal.
        """
        try:
            writer = self._begun()
            writer.append(record)
            writer.sync()
        except (OSError, JournalError) as error:
            return NotWritten("disk", str(error))
        return sum(writer.sizes.values())

    def put_weights(self, record: WeightsRecord) -> NotWritten | None:
        """Write what a step has led to; on the disk with the next step's record."""
        try:
            self._begun().append(record)
        except (OSError, JournalError) as error:
            return NotWritten("disk", str(error))
        return None

    def rotate(self) -> NotWritten | None:
        """Begin a new segment."""
        try:
            self._begun().rotate()
        except (OSError, JournalError) as error:
            return NotWritten("disk", str(error))
        return None

    def trim(self, checkpoints: Sequence[int]) -> NotWritten | None:
        """Remove the segments that are not needed any more.

        Args:
            checkpoints: Steps of the complete checkpoints, in order.
        """
        try:
            writer = self._begun()
            older = {n: size for n, size in writer.sizes.items() if n != writer.current}
            last, limits = writer.last_steps, self._limits
            gone = removable(older, last, checkpoints, limits.limit_bytes, limits.keep_all)
            for number in gone:
                writer.remove(number)
        except (OSError, JournalError) as error:
            return NotWritten("disk", str(error))
        return None

    def _begun(self) -> JournalWriter:
        if self._writer is None:
            self._writer = JournalWriter(self._folder, self._head)
        return self._writer
