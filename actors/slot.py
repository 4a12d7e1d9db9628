"""A place in the pool: the actor in it, and calls to it that notice when it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cohort.actors.errors import CohortError, failure_of
from cohort.actors.handle import RolloutHandle
from cohort.actors.machine import split_cores
from cohort.actors.records import UNSYNCED, Place
from cohort.actors.watch import BEAT_S, FROZEN_S, Watch
from cohort.actors.witness import Witnesses

T = TypeVar("T")


class RolloutError(CohortError):
    """The pool cannot go on; the message says which actor, what happened, what to change."""


class ActorLost(Exception):
    """An actor died or makes no progress."""


@dataclass
class Slot:
    """A place in the pool; the actor in it may be replaced.

    Attributes:
        index: Of its actor's name.
        handle: Calls to its actor.
        witnesses: Look at its actor's process when it does not answer.
        beat_s: Seconds between two looks at it.
        pause_s: How long an update may be without progress, while generation stands still.
        cores: Of its engine.
        place: Where its actor runs; None before it has told.
        load: Completions that it works on.
        ready: It has weights, and may be given groups.
        version: Of the weights that its engine has acknowledged.
        gap: The probe's at its last update.
        updating: It is about to have the newest weights: what it is given meanwhile waits for them.
        syncing: An update is being loaded.
        leaving: It gets no more groups, because there are to be fewer actors.
        failures: In a row, without a group in between; failing_since: the first of them.
        generation: How many actors it has had.
        repair: The task that replaces its actor.
        pulling: The task that brings it to the newest weights.
        watch: Of its actor's progress; beats: the task that feeds it, for as long as there are
            waiters.
    """

    index: int
    handle: RolloutHandle
    witnesses: Witnesses = field(default_factory=Witnesses)
    beat_s: float = BEAT_S
    pause_s: float = 0.0
    cores: tuple[int, ...] = ()
    place: Place | None = None
    load: int = 0
    ready: bool = False
    version: int = UNSYNCED
    gap: float = 0.0
    updating: bool = False
    syncing: bool = False
    leaving: bool = False
    failures: int = 0
    failing_since: float = 0.0
    generation: int = 0
    repair: asyncio.Task[None] | None = None
    pulling: asyncio.Task[None] | None = None
    watch: Watch = field(default_factory=Watch)
    waiters: int = 0
    beats: asyncio.Task[None] | None = None

    def takes(self, oldest: int) -> bool:
        """Whether it may be given a group that asks for weights of this version or newer ones."""
        return self.ready and not self.leaving and (self.version >= oldest or self.updating)

    @property
    def hopeful(self) -> bool:
        """Whether it serves, or is on its way to."""
        return self.ready or self.repair is not None or self.pulling is not None

    def fail(self) -> None:
        """Count a failure."""
        self.failing_since = self.failing_since if self.failures else time.monotonic()
        self.failures += 1

    def replace(self, handle: RolloutHandle) -> None:
        """Put a new actor in the place of one that was lost."""
        self.handle = handle
        self.give_up()

    def give_up(self) -> None:
        """Forget its actor, and have those who wait for it go elsewhere."""
        self.generation += 1
        self.ready, self.version, self.place = False, UNSYNCED, None
        self.watch = Watch()

    async def moving(self, reference: Awaitable[T], limit_s: float, what: str) -> T:
        """An actor's answer, however long it takes; ActorLost once it makes no progress."""
        generation, watch = self.generation, self.watch
        since = watch.total_s
        call = asyncio.ensure_future(reference)
        self.waiters += 1
        if self.beats is None:
            self.beats = asyncio.create_task(self._beat())
        try:
            while not (await asyncio.wait({call}, timeout=self.beat_s))[0]:
                if self.generation != generation:
                    raise ActorLost(f"rollout-{self.index} was replaced {what}")
                if watch.frozen:
                    raise ActorLost(
                        f"rollout-{self.index} is frozen: its process is stopped, or has computed "
                        f"nothing for {FROZEN_S:g} s {what}"
                    )
                pause = self.pause_s if self.syncing else 0.0
                if watch.late(since, max(limit_s, pause)):
                    raise ActorLost(
                        f"rollout-{self.index} made no progress for {limit_s:g} s {what}"
                    )
            watch.heard()
            return self._answer(call)
        finally:
            _drop(call)
            self.waiters -= 1
            if not self.waiters and self.beats is not None:
                self.beats.cancel()
                self.beats = None

    async def _beat(self) -> None:
        """Ask the slot's actor now and then how far it is, for as long as somebody waits for it."""
        asking: asyncio.Future[Place] | None = None
        watch, last = self.watch, time.monotonic()
        try:
            while True:
                if watch is not self.watch:
                    # Another actor: the old one's answer says nothing of it.
                    watch = self.watch
                    _drop(asking)
                    asking = None
                if asking is None:
                    asking = asyncio.ensure_future(self.handle.place())
                await asyncio.sleep(self.beat_s)
                told = None
                if asking.done():
                    # An error is noticed by those who wait, in their own calls.
                    told = None if asking.exception() else asking.result()
                    asking = None
                if told is None and self.place is not None:
                    look = await self.witnesses.look(self.place)
                else:
                    look = None if told is None else told.look
                now = time.monotonic()
                # More than two beats: it was this process that did not run.
                elapsed, last = min(now - last, 2 * self.beat_s), now
                if told is None:
                    watch.beat(elapsed, look=look)
                else:
                    watch.beat(elapsed, told.progress, look, told.working)
        finally:
            _drop(asking)

    async def within(self, reference: Awaitable[T], timeout_s: float, what: str) -> T:
        """An actor's answer; ActorLost when it takes longer than that."""
        call = asyncio.ensure_future(reference)
        try:
            if (await asyncio.wait({call}, timeout=timeout_s))[0]:
                return self._answer(call)
            raise ActorLost(f"rollout-{self.index} took over {timeout_s:.0f} s {what}")
        finally:
            call.cancel()

    def _answer(self, call: asyncio.Future[T]) -> T:
        """What an actor answered, or what is to be done about its error."""
        error = call.exception()
        if error is None:
            return call.result()
        if not isinstance(error, Exception):
            raise error
        failure = failure_of(error, f"rollout-{self.index}")
        if failure.kind == "infra":
            raise ActorLost(f"{failure.what} died: {failure.message}") from None
        # Its methods answer with values: an exception is a mistake in the program.
        raise RolloutError(f"{failure.what} failed: {failure.message}") from error


def _drop(asking: asyncio.Future[T] | None) -> None:
    """Cancel a call; its error, if it has one already, was seen."""
    if asking is not None and not asking.cancel() and not asking.cancelled():
        asking.exception()


def divide_cores(slots: Sequence[Slot]) -> None:
    """Give the actors of each node its cores, in equal parts."""
    nodes: dict[str, list[tuple[Slot, Place]]] = {}
    for slot in slots:
        if slot.place is not None:
            nodes.setdefault(slot.place.node_id, []).append((slot, slot.place))
    for here in nodes.values():
        shares = split_cores(here[0][1].cores, len(here))
        for (slot, _), cores in zip(here, shares, strict=True):
            slot.cores = cores
