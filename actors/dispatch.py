"""Which actor generates which group, and who waits for an actor with room."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cohort.actors.records import Failure, Group, GroupMeta, Request
from cohort.actors.slot import RolloutError, Slot

if TYPE_CHECKING:
    from ray import ObjectRef

# (group id, attempt, reference to a group of one): a completion that is there before its group is.
Arrived: TypeAlias = "Callable[[str, int, ObjectRef[Group]], None]"
# A group's sizes and the reference to it, or why it was not generated and None.
Outcome: TypeAlias = "tuple[GroupMeta | Failure, ObjectRef[Group] | None]"


@dataclass
class Job:
    """A group that the pool was asked for.

    Attributes:
        order: Of arrival.
        arrived: Called with each of its completions as soon as it exists.
        attempt: How many attempts to generate it have failed.
    """

    request: Request
    order: int
    arrived: Arrived | None = None
    attempt: int = 0

    @property
    def completions(self) -> int:
        return self.request.sampling.n

    @property
    def priority(self) -> tuple[int, int]:
        """Less is earlier. Older steps go first, also those that wait because they were lost."""
        return self.request.step, self.order


class Dispatcher:
    """Gives each group to the least loaded actor with room; the oldest step's go first.

    Args:
        slots: The actors; the list is the pool's, which fills it.
        max_concurrent: Completions that an actor has room for.
        timeout_s: Seconds between two looks whether there is still an actor to wait for.
    """

    def __init__(self, slots: Sequence[Slot], max_concurrent: int, timeout_s: float) -> None:
        self._slots = slots
        self._max_concurrent = max_concurrent
        self._timeout_s = timeout_s
        # (priority, job, who waits); priorities differ, so that jobs are never compared.
        self.queue: list[tuple[tuple[int, int], Job, asyncio.Future[Slot]]] = []
        self.broken: RolloutError | None = None

    def reserve_now(self, job: Job) -> Slot | None:
        """Room for a job, if no job that waits goes before it; None when there is none."""
        if self.queue and job.priority > self.queue[0][0]:
            return None
        return self._reserve(job)

    async def reserve(self, job: Job) -> Slot:
        """Wait for an actor with room.

        How long that takes is the engines' business, each of which is watched: only when there is
        none left to wait for is it an error.

        Raises:
            RolloutError: No actor has weights, or will have; or the pool cannot go on.
        """
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        heapq.heappush(self.queue, (job.priority, job, future))
        self.dispatch()
        try:
            while not (await asyncio.wait({future}, timeout=self._timeout_s))[0]:
                if not any(slot.hopeful for slot in self._slots):
                    raise RolloutError(
                        f"group {job.request.group_id} waited {self._timeout_s:g} s and "
                        "no rollout actor has weights to generate it with"
                    )
            return future.result()
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                future.result().load -= job.completions
            raise
        finally:
            future.cancel()
            self.dispatch()

    def release(self, slot: Slot, job: Job) -> None:
        """Take back the room that a job had."""
        slot.load -= job.completions
        self.dispatch()

    def dispatch(self) -> None:
        """Give the room that there is to the jobs that wait, in order of priority."""
        while self.queue:
            _, job, future = self.queue[0]
            if not future.done():
                if self.broken is not None:
                    future.set_exception(self.broken)
                    continue
                slot = self._reserve(job)
                if slot is None:
                    return
                future.set_result(slot)
            heapq.heappop(self.queue)

    def fail(self, error: RolloutError) -> None:
        """From now on every job that waits fails with this error, or with an earlier one."""
        self.broken = self.broken or error
        self.dispatch()

    def _reserve(self, job: Job) -> Slot | None:
        room = self._max_concurrent - job.completions
        oldest = job.request.oldest
        free = [slot for slot in self._slots if slot.takes(oldest) and slot.load <= room]
        slot = min(free, key=lambda slot: (slot.load, slot.index), default=None)
        if slot is not None:
            slot.load += job.completions
        return slot
