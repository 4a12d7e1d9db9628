"""RolloutPool: many rollout actors as one thing that turns requests into groups.

Requests go to the least loaded actor that has room, the oldest step first; what an actor loses is
generated again by another one at once. The actors themselves are the `Fleet`'s. Everything here
runs in the driver's asyncio loop and sees sizes and references, never tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from cohort.actors.config import ActorsConfig
from cohort.actors.dispatch import Arrived, Job, Outcome
from cohort.actors.fleet import Fleet, MakeActor
from cohort.actors.probe import Probe
from cohort.actors.records import (
    EpisodeHost,
    Failure,
    GroupMeta,
    NotSynced,
    Request,
    WeightsInfo,
)
from cohort.actors.slot import ActorLost, RolloutError, Slot

MAX_ATTEMPTS = 3

# The call that hands groups to an actor. Its errors are values, because many groups wait for it.
_Submission: TypeAlias = "asyncio.Task[Failure | ActorLost | RolloutError | None]"


class RolloutPool:
    """The rollout actors of a run.

    Args:
        make_actor: Makes the Ray actor of this name.
        config: The `actors` section.
        notify: Tells the user, in a line, what became of an actor.
        next_host: Where the environment of the next group runs; None: there is none.
        cores: That engines may use of their machine; empty: all.

    Attributes:
        fleet: The actors.
    """

    def __init__(
        self,
        make_actor: MakeActor,
        config: ActorsConfig,
        notify: Callable[[str], None],
        next_host: Callable[[], EpisodeHost] | None = None,
        cores: tuple[int, ...] = (),
    ) -> None:
        self._config = config
        self._next_host = next_host
        self._arrivals = itertools.count()
        self.fleet = Fleet(make_actor, config, notify, cores)
        self._dispatcher = self.fleet.dispatcher

    async def start(self, place_timeout_s: float, serve_loaded: bool = False) -> list[float]:
        """Start the actors; see `Fleet.start`."""
        return await self.fleet.start(place_timeout_s, serve_loaded)

    async def sync(self, info: WeightsInfo, probe: Probe) -> float:
        """Have the actors pull published weights; see `Fleet.sync`."""
        return await self.fleet.sync(info, probe)

    async def generate(
        self, requests: list[Request], arrived: Arrived | None = None
    ) -> list[asyncio.Task[Outcome]]:
        """Start generating.

        Args:
            requests: One for each group.
            arrived: Called with every completion as soon as it exists, and with all of them before
                the group's task ends. A group that is tried again has new ones, which count alone.

        Returns:
            One task a request, in order. Each ends in a group's sizes and its reference, or in a
            Failure once it was tried often enough.
        """
        if self._next_host is not None:
            requests = [replace(request, host=self._next_host()) for request in requests]
        jobs = [Job(request, next(self._arrivals), arrived) for request in requests]
        slots = [self._dispatcher.reserve_now(job) for job in jobs]
        batches: dict[int, tuple[Slot, list[Request]]] = {}
        for request, slot in zip(requests, slots, strict=True):
            if slot is not None:
                batches.setdefault(slot.index, (slot, []))[1].append(request)
        # One call per actor: its engine sees the whole batch at once, in this order.
        calls = {index: self._submit(*batch) for index, batch in batches.items()}
        return [
            asyncio.create_task(
                self._produce(job, None if slot is None else (slot, calls[slot.index]))
            )
            for job, slot in zip(jobs, slots, strict=True)
        ]

    def _submit(self, slot: Slot, requests: list[Request]) -> _Submission:
        async def submit() -> Failure | ActorLost | RolloutError | None:
            try:
                return await slot.moving(
                    slot.handle.submit(requests),
                    self._config.group_timeout_s,
                    f"to take {len(requests)} groups (actors.group_timeout_s)",
                )
            except (ActorLost, RolloutError) as error:
                return error

        return asyncio.create_task(submit())

    async def _produce(self, job: Job, submitted: tuple[Slot, _Submission] | None) -> Outcome:
        """Generate a group, again where an actor loses it.

        submitted: where it is already; None: it has to wait for an actor with room.
        """
        while True:
            if submitted is None:
                slot = await self._dispatcher.reserve(job)
                submitted = slot, self._submit(slot, [job.request])
            meta, group = await self._attempt(job, *submitted)
            if isinstance(meta, GroupMeta):
                return meta, group
            if not isinstance(meta, NotSynced):
                job.attempt += 1
                if meta.kind == "data" or job.attempt == MAX_ATTEMPTS:
                    return meta, None
            submitted = None

    async def _attempt(self, job: Job, slot: Slot, submission: _Submission) -> Outcome:
        """What becomes of a group on one actor, which is replaced where the fault is its own."""
        generation = slot.generation
        try:
            refused = await asyncio.shield(submission)
            if isinstance(refused, Exception):
                raise refused
            meta, group = (refused, None) if refused else await self._collect(slot, job)
            if isinstance(meta, GroupMeta):
                slot.failures = 0
            elif isinstance(meta, NotSynced):
                # Nothing is lost: another actor takes the group, or this one once it has weights.
                self.fleet.unsynced(slot, generation)
            elif meta.kind == "infra":
                self.fleet.lose(slot, generation, meta.message)
            elif meta.kind == "bug":
                raise RolloutError(str(meta))
            return meta, group
        except ActorLost as lost:
            self.fleet.lose(slot, generation, str(lost))
            if slot.leaving:
                what = f"group {job.request.group_id} was handed back"
                return NotSynced("infra", what, str(lost)), None
            return Failure("infra", f"group {job.request.group_id} was lost", str(lost)), None
        except asyncio.CancelledError:
            self._forget(slot, generation, job.request)
            raise
        finally:
            self._dispatcher.release(slot, job)

    async def _collect(self, slot: Slot, job: Job) -> Outcome:
        """Wait for a group that an actor has taken, and hand on its completions meanwhile."""
        name, arrived = job.request.group_id, job.arrived
        early: list[asyncio.Task[None]] = []
        if arrived is not None:
            early = [
                asyncio.create_task(self._hand_on(slot, job, index, arrived))
                for index in range(job.completions)
            ]
        try:
            meta_ref, group = slot.handle.collect(name)
            meta = await slot.moving(
                meta_ref,
                self._config.group_timeout_s,
                f"while it generated group {name} (actors.group_timeout_s)",
            )
            if early:
                await asyncio.wait(early, timeout=self._config.group_timeout_s)
            return meta, group
        finally:
            for task in early:
                task.cancel()

    @staticmethod
    async def _hand_on(slot: Slot, job: Job, index: int, arrived: Arrived) -> None:
        failure, completion = slot.handle.completion(job.request.group_id, index)
        # An actor that dies fails `collect` as well, which reports it.
        with contextlib.suppress(Exception):
            if await failure is None:
                arrived(job.request.group_id, job.attempt, completion)

    @staticmethod
    def _forget(slot: Slot, generation: int, request: Request) -> None:
        """Nobody waits for a group any more: its actor stops generating it."""

        def tell() -> None:
            if slot.generation == generation and slot.repair is None:
                slot.handle.forget(request.group_id)

        asyncio.get_running_loop().call_soon(tell)

    def check(self) -> None:
        """Raise RolloutError when an engine serves wrong weights, or none is left: what was
        generated meanwhile is not to be trained."""
        if self._dispatcher.broken is not None:
            raise self._dispatcher.broken

    async def memory(self) -> int:
        """Peak resident bytes of all actors and engines that answer within half a minute."""
        calls = [asyncio.ensure_future(slot.handle.memory()) for slot in self.fleet.slots]
        done, late = await asyncio.wait(calls, timeout=30) if calls else (set(), set())
        for call in late:
            call.cancel()
        return sum(call.result() for call in done if call.exception() is None)

    def kill(self) -> None:
        """End every actor now; their watchers end the engines."""
        self.fleet.kill()
