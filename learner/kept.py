"""The copies of the ranks' state as the driver knows them, and checkpoints written from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cohort.learner.copies import same_place
from cohort.learner.gang import Gang
from cohort.learner.ranks import LearnerError, Ranks
from cohort.learner.worker import LearnerWorker


class KeptCopies:
    """The generations of copies: the newest, and the one that a checkpoint is being written from.

    Args:
        gang: Of the ranks, with the owners of the memory that the copies lie in.
        notify: Told what people should know.

    Attributes:
        newest: The copy of the state after the last step; None where there is none.
    """

    def __init__(self, gang: Gang, notify: Callable[[str], None]) -> None:
        self.newest: int | None = None
        self._gang = gang
        self._notify = notify
        self._generation = 0
        self._read: tuple[int, asyncio.Task[None]] | None = None

    async def keep(self, ranks: Ranks) -> None:
        """Have all ranks copy their state. A copy that cannot be written is reported once."""
        first = self._gang.first_on_their_machines()
        generation = self._generation + 1
        await self._until_unread(generation)
        try:
            await ranks.each(
                "copying its state", LearnerWorker.keep, [(generation, flag) for flag in first]
            )
        except LearnerError as error:
            if not error.savable:
                raise
            if self.newest is not None or self._generation == 0:
                self._notify(
                    f"{error}\nTraining goes on; the death of a learner rank would end it. Make "
                    "room in /dev/shm, or set learner.keep_copy=false"
                )
            # What was kept is older than the weights are now.
            self.newest = None
        else:
            self.newest = generation
        self._generation = generation

    def write(self, folder: str) -> asyncio.Task[None]:
        """Begin to write the newest copy into a checkpoint's folder; see `Gang.write`."""
        assert self.newest is not None, "there is a copy to write"
        task = asyncio.create_task(self._gang.write(self.newest, folder))
        self._read = self.newest, task
        return task

    async def _until_unread(self, generation: int) -> None:
        """Wait while a checkpoint is being written from the place of this copy."""
        if self._read is None:
            return
        read, task = self._read
        if same_place(read, generation) and not task.done():
            self._notify("the next copy of the learner's state waits for the checkpoint's files")
            await asyncio.wait({task})
