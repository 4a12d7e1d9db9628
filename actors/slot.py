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
from cohort.actors.records import Place

T = TypeVar("T")
# An engine that computes without finishing a step may be in a long one (a long prompt, code that
# is compiled at its first use), or in an endless loop: it gets this many times as long.
BUSY_FACTOR = 5.0
# Fraction of a core from which its processes count as computing.
BUSY_FRACTION = 0.2


class RolloutError(CohortError):
    """The pool cannot go on; the message says which actor, what happened, what to change."""


class ActorLost(Exception):
    """An actor died or makes no progress."""


@dataclass
class Watch:
    """How long an actor has made no progress, by its answers to regular heartbeats.

    silent_s: seconds since its number last moved; those in which its engine computed count a
    BUSY_FACTOR-th. total_s: seconds watched. Both leave out time in which the watcher itself did
    not run (a suspended driver).
    """

    silent_s: float = 0.0
    total_s: float = 0.0
    progress: int | None = None
    cpu_s: float = 0.0

    def beat(self, elapsed_s: float, progress: int | None = None, cpu_s: float = 0.0) -> None:
        """elapsed_s: since the beat before. progress, cpu_s: what it told; None: no answer yet."""
        self.total_s += elapsed_s
        if progress is None:
            self.silent_s += elapsed_s
            return
        busy = cpu_s - self.cpu_s > BUSY_FRACTION * elapsed_s
        moved = progress != self.progress
        self.silent_s = 0.0 if moved else self.silent_s + elapsed_s / (BUSY_FACTOR if busy else 1.0)
        self.progress, self.cpu_s = progress, cpu_s

    def late(self, since_s: float, limit_s: float) -> bool:
        """Whether nothing has moved for limit_s of the time after since_s (a `total_s`)."""
        return min(self.silent_s, self.total_s - since_s) >= limit_s


@dataclass
class Slot:
    """A place in the pool; the actor in it may be replaced.

    ready: it may be given groups. repair: the task that is replacing its actor. gap: the probe's at
    its last update. waiters: calls that its watch is kept for. beat_s: between two looks at it.
    pause_s: how long an update may be without progress, while generation stands still.
    """

    index: int
    handle: RolloutHandle
    cores: tuple[int, ...] = ()
    load: int = 0
    ready: bool = False
    syncing: bool = False
    failures: int = 0
    generation: int = 0
    gap: float = 0.0
    repair: asyncio.Task[None] | None = None
    watch: Watch = field(default_factory=Watch)
    waiters: int = 0
    beats: asyncio.Task[None] | None = None
    beat_s: float = 5.0
    pause_s: float = 0.0

    def replace(self, handle: RolloutHandle) -> None:
        """Put a new actor in the place of one that was lost."""
        self.handle = handle
        self.generation += 1
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
                pause = self.pause_s if self.syncing else 0.0
                if watch.late(since, max(limit_s, pause)):
                    raise ActorLost(
                        f"rollout-{self.index} made no progress for {limit_s:g} s {what}"
                    )
            watch.silent_s = 0.0
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
                now = time.monotonic()
                # More than two beats: it was this process that did not run.
                elapsed, last = min(now - last, 2 * self.beat_s), now
                place = None
                if asking.done():
                    # An error is noticed by those who wait, in their own calls.
                    place = None if asking.exception() else asking.result()
                    asking = None
                if place is None:
                    watch.beat(elapsed)
                else:
                    watch.beat(elapsed, place.progress, place.cpu_s)
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


def divide_cores(slots: Sequence[Slot], places: Sequence[Place]) -> None:
    """Give the actors of each node its cores, in equal parts."""
    for node in {place.node_id for place in places}:
        here = [i for i, place in enumerate(places) if place.node_id == node]
        shares = split_cores(places[here[0]].cores, len(here))
        for index, cores in zip(here, shares, strict=True):
            slots[index].cores = cores
