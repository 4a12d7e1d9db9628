"""RolloutPool: many rollout actors as one thing that turns requests into groups.

Requests go to the least loaded actor that has room, the oldest step first; what an actor loses is
generated again by another one; an actor that died is replaced by a new one in the background, which
pulls the current weights before it may generate. Everything here runs in the driver's asyncio loop
and sees sizes and references, never tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from cohort.actors.config import ActorsConfig
from cohort.actors.dispatch import Arrived, Dispatcher, Job, Outcome
from cohort.actors.errors import failure_of
from cohort.actors.handle import RolloutHandle
from cohort.actors.probe import Probe, limit_of, probe_gap, stale
from cohort.actors.records import (
    EpisodeHost,
    Failure,
    GroupMeta,
    NotSynced,
    Request,
    WeightsInfo,
)
from cohort.actors.slot import ActorLost, RolloutError, Slot, divide_cores

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from cohort.actors.rollout import RolloutActor

MAX_ATTEMPTS = 3
# Of one actor in a row, without a group in between: after that, the process is not at fault.
MAX_RESTARTS = 3
# An update waits this long for an actor that was lost in it, when others can go on without it.
REPAIR_GRACE_S = 1.0
BEAT_S = 5.0

# The call that hands groups to an actor. Its errors are values, because many groups wait for it.
_Submission: TypeAlias = "asyncio.Task[Failure | ActorLost | RolloutError | None]"


class RolloutPool:
    """The rollout actors of a run.

    Args:
        make_actor: Makes the Ray actor of this name.
        config: The `actors` section.
        notify: Tells the user, in a line, that an actor is replaced.
        next_host: Where the environment of the next group runs; None: there is none.
    """

    def __init__(
        self,
        make_actor: Callable[[str], ActorProxy[RolloutActor]],
        config: ActorsConfig,
        notify: Callable[[str], None],
        next_host: Callable[[], EpisodeHost] | None = None,
    ) -> None:
        self._make_actor = make_actor
        self._config = config
        self._notify = notify
        self._next_host = next_host
        self._slots: list[Slot] = []
        self._dispatcher = Dispatcher(self._slots, config.max_concurrent, config.group_timeout_s)
        self._arrivals = itertools.count()
        self._published: tuple[WeightsInfo, Probe] | None = None
        self._probe_before: Probe | None = None
        self._first_gap: float | None = None
        self._serve_loaded = False
        self.restarts = 0

    async def start(self, place_timeout_s: float, serve_loaded: bool = False) -> list[float]:
        """Place every actor, give each its cores, start all engines; seconds each took.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        Raises RolloutError naming the actor and the engine's own last words.
        """
        self._serve_loaded = serve_loaded
        limits = (self._config.group_timeout_s, self._config.sync_timeout_s)
        self._slots += [
            Slot(
                index,
                RolloutHandle(self._make_actor(f"rollout-{index}")),
                beat_s=min(BEAT_S, min(limits) / 5),
                pause_s=self._config.sync_timeout_s,
            )
            for index in range(self._config.count)
        ]
        try:
            places = await asyncio.gather(
                *(
                    slot.within(
                        slot.handle.place(),
                        place_timeout_s,
                        f"to be placed by Ray, one of {self._config.count} actors "
                        "(cluster.start_timeout_s; actors.count may exceed the cluster)",
                    )
                    for slot in self._slots
                )
            )
            divide_cores(self._slots, places)
            return list(await asyncio.gather(*(self._start_engine(slot) for slot in self._slots)))
        except ActorLost as lost:
            # Nothing ran yet: what fails now is most likely the setup, which a retry repeats.
            raise RolloutError(str(lost)) from None

    async def _start_engine(self, slot: Slot) -> float:
        answer = await slot.within(
            slot.handle.start(slot.cores, self._serve_loaded),
            self._config.start_timeout_s,
            "to start its engine (actors.start_timeout_s)",
        )
        if isinstance(answer, Failure):
            raise ActorLost(str(answer))
        slot.ready = self._serve_loaded
        return answer

    async def sync(self, info: WeightsInfo, probe: Probe) -> float:
        """Bring every actor to a published version; the largest probe gap, in nats.

        An actor that was lost meanwhile is replaced, and one that is being replaced is left alone:
        both pull the newest version when they are up, and are waited for only when no other can go
        on. Raises RolloutError when an engine does not serve the weights that were published.
        """
        if self._published is not None and self._published[0].version != info.version:
            self._probe_before = self._published[1]
        self._published = (info, probe)
        here = [slot for slot in self._slots if slot.repair is None]
        done = await asyncio.gather(*map(self._catch_up, here), return_exceptions=True)
        for error in done:
            if isinstance(error, BaseException):
                raise error
        if lost := [slot.repair for slot in here if slot.repair is not None]:
            await asyncio.wait(lost, timeout=REPAIR_GRACE_S)
        while self._dispatcher.broken is None and not any(slot.ready for slot in self._slots):
            await asyncio.wait(
                [slot.repair for slot in self._slots if slot.repair is not None],
                return_when=asyncio.FIRST_COMPLETED,
            )
        if self._dispatcher.broken is not None:
            raise self._dispatcher.broken
        return max(slot.gap for slot in self._slots if slot.ready)

    async def _catch_up(self, slot: Slot) -> None:
        generation = slot.generation
        try:
            await self._pull(slot)
        except ActorLost as lost:
            self._lose(slot, generation, str(lost))

    async def _pull(self, slot: Slot) -> None:
        while await self._load_newest(slot):
            pass

    async def _load_newest(self, slot: Slot) -> bool:
        """Have an actor load the newest version and prove it; whether there is a newer one now."""
        if self._published is None:
            return False
        published = info, probe = self._published
        slot.syncing = True
        try:
            answer = await slot.moving(
                slot.handle.sync(info, probe.token_ids),
                self._config.sync_timeout_s,
                f"to load weights {info.version} (actors.sync_timeout_s)",
            )
        finally:
            slot.syncing = False
        if isinstance(answer, Failure):
            if self._published is not published:
                # Its file may be gone already: the newest is what counts.
                return True
            error = ActorLost if answer.kind == "infra" else RolloutError
            raise error(str(answer))
        slot.gap = self._proven(slot, info, probe, answer)
        if self._published is not published:
            return True
        slot.ready = True
        self._dispatcher.dispatch()
        return False

    def _proven(self, slot: Slot, info: WeightsInfo, probe: Probe, logprobs: list[float]) -> float:
        """The probe's gap; RolloutError when the engine computes with other weights."""
        gap = probe_gap(probe.logprobs, logprobs)
        limit = limit_of(probe, self._first_gap)
        says = (
            f"rollout-{slot.index} does not serve the weights that were published: its log-probs "
            f"on the probe sequence differ from the learner's by {gap:.4f} on average after "
            f"weights version {info.version}"
        )
        if not gap <= limit:
            raise RolloutError(f"{says}, and the limit is {limit:g} (actors.probe_tolerance)")
        usual = gap if self._first_gap is None else self._first_gap
        if stale(probe, self._probe_before, logprobs, usual):
            raise RolloutError(f"{says}, and are nearer to those of the version before")
        if self._first_gap is None:
            self._first_gap = gap
        return gap

    async def generate(
        self, requests: list[Request], arrived: Arrived | None = None
    ) -> list[asyncio.Task[Outcome]]:
        """Start generating; one task a request, in order. Each ends in a group's sizes and its
        reference, or in a Failure once it was tried often enough.

        arrived: called with every completion as soon as it exists, and with all of them before
        the group's task ends. A group that is tried again has new ones, which count alone.
        """
        if self._next_host is not None:
            requests = [replace(request, host=self._next_host()) for request in requests]
        jobs = [Job(request, next(self._arrivals), arrived) for request in requests]
        slots = [self._dispatcher.reserve_now(job) for job in jobs]
        batches: dict[int, list[Request]] = {}
        for request, slot in zip(requests, slots, strict=True):
            if slot is not None:
                batches.setdefault(slot.index, []).append(request)
        # One call per actor: its engine sees the whole batch at once, in this order.
        calls = {index: self._submit(self._slots[index], batch) for index, batch in batches.items()}
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
                self._lose(slot, generation, None)
            elif meta.kind == "infra":
                self._lose(slot, generation, meta.message)
            elif meta.kind == "bug":
                raise RolloutError(str(meta))
            return meta, group
        except ActorLost as lost:
            self._lose(slot, generation, str(lost))
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

    def _lose(self, slot: Slot, generation: int, why: str | None) -> None:
        """Replace a slot's actor, once for all the groups that noticed its end.

        why: None: the actor lives and has no weights; it pulls them.
        """
        if why is None and slot.syncing:
            return
        if slot.generation == generation and slot.repair is None:
            slot.ready = False
            slot.repair = asyncio.create_task(self._repair(slot, why))

    async def _repair(self, slot: Slot, why: str | None) -> None:
        try:
            if why is None:
                try:
                    return await self._pull(slot)
                except ActorLost as lost:
                    why = str(lost)
            while True:
                slot.failures += 1
                if slot.failures > MAX_RESTARTS:
                    raise RolloutError(
                        f"rollout-{slot.index} failed {slot.failures} times in a row; the last "
                        f"time: {why}"
                    )
                self.restarts += 1
                self._notify(f"rollout-{slot.index} is replaced: {why}")
                slot.handle.kill()
                slot.replace(RolloutHandle(self._make_actor(f"rollout-{slot.index}")))
                try:
                    await self._bring_up(slot)
                    return
                except ActorLost as lost:
                    why = str(lost)
        except RolloutError as error:
            self._dispatcher.fail(error)
        except Exception as error:  # noqa: BLE001 - those who wait must hear of it
            failure = failure_of(error, f"replacing rollout-{slot.index}")
            self._dispatcher.fail(RolloutError(str(failure)))
        finally:
            slot.repair = None
            self._dispatcher.dispatch()

    async def _bring_up(self, slot: Slot) -> None:
        """Place and start a new actor, with the newest weights."""
        await slot.within(
            slot.handle.place(),
            self._config.start_timeout_s,
            "to be placed by Ray (actors.start_timeout_s)",
        )
        await self._start_engine(slot)
        if not self._serve_loaded:
            await self._pull(slot)

    async def memory(self) -> int:
        """Peak resident bytes of all actors and engines that answer within half a minute."""
        calls = [asyncio.ensure_future(s.handle.memory()) for s in self._slots]
        done, late = await asyncio.wait(calls, timeout=30) if calls else (set(), set())
        for call in late:
            call.cancel()
        return sum(call.result() for call in done if call.exception() is None)

    def kill(self) -> None:
        """End every actor now; their watchers end the engines."""
        for slot in self._slots:
            for task in (slot.repair, slot.beats):
                if task is not None:
                    task.cancel()
            slot.handle.kill()
