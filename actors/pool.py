"""RolloutPool: many rollout actors as one thing that turns requests into groups.

Requests go to the least loaded actor that has room, the oldest step first; what an actor loses is
generated again by another one; an actor that died is replaced by a new one in the background, which
pulls the current weights before it may generate. Everything here runs in the driver's asyncio loop
and sees sizes and references, never tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable
from typing import Any

from cohort.actors.config import ActorsConfig
from cohort.actors.errors import failure_of
from cohort.actors.probe import Probe, limit_of, probe_gap, stale
from cohort.actors.records import Failure, GroupMeta, Request, WeightsInfo
from cohort.actors.rollout import NotSynced, Place, split_cores
from cohort.actors.slot import ActorLost, RolloutError, Slot
from cohort.actors.watch import Watch

__all__ = ["MAX_RESTARTS", "Probe", "RolloutError", "RolloutPool", "probe_gap"]

MAX_ATTEMPTS = 3
# Of one actor in a row, without a group between them: then the fault is not in the process.
MAX_RESTARTS = 3
# An update waits this long for an actor that was lost in it, when others can go on without it.
REPAIR_GRACE_S = 1.0
BEAT_S = 5.0

Outcome = tuple[GroupMeta | Failure, Any]
# (group id, attempt, reference to a group of one): a completion that is there before its group is.
Arrived = Callable[[str, int, Any], None]


# (step, order of arrival, completions, who waits)
_Waiting = tuple[int, int, int, "asyncio.Future[Slot]"]


class RolloutPool:
    """The rollout actors of a run. notify: tells the user, in a line, of an actor's end."""

    def __init__(
        self,
        make_actor: Callable[[str], Any],
        config: ActorsConfig,
        notify: Callable[[str], None],
    ) -> None:
        self._make_actor = make_actor
        self._config = config
        self._notify = notify
        self._slots: list[Slot] = []
        self._queue: list[_Waiting] = []
        self._arrivals = itertools.count()
        self._published: tuple[WeightsInfo, Probe] | None = None
        self._probe_before: Probe | None = None
        self._first_gap: float | None = None
        self._serve_loaded = False
        self._broken: RolloutError | None = None
        self.places: list[Place] = []
        self.restarts = 0

    async def start(self, place_timeout_s: float, serve_loaded: bool = False) -> list[float]:
        """Place every actor, give each its cores, start all engines; seconds each took.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        Raises RolloutError naming the actor and the engine's own last words.
        """
        self._serve_loaded = serve_loaded
        limits = (self._config.group_timeout_s, self._config.sync_timeout_s)
        self._slots = [
            Slot(
                index,
                self._make_actor(f"rollout-{index}"),
                beat_s=min(BEAT_S, min(limits) / 5),
                pause_s=self._config.sync_timeout_s,
            )
            for index in range(self._config.count)
        ]
        try:
            self.places = await asyncio.gather(
                *(
                    slot.within(
                        slot.handle.place.remote(),
                        place_timeout_s,
                        f"to be placed by Ray, one of {self._config.count} actors "
                        "(cluster.start_timeout_s; actors.count may exceed the cluster)",
                    )
                    for slot in self._slots
                )
            )
            for node in {place.node_id for place in self.places}:
                here = [i for i, place in enumerate(self.places) if place.node_id == node]
                shares = split_cores(self.places[here[0]].cores, len(here))
                for index, cores in zip(here, shares, strict=True):
                    self._slots[index].cores = cores
            return list(await asyncio.gather(*(self._start_engine(slot) for slot in self._slots)))
        except ActorLost as lost:
            # Nothing ran yet: what fails now is most likely the setup, which a retry repeats.
            raise RolloutError(str(lost)) from None

    async def _start_engine(self, slot: Slot) -> float:
        answer = await slot.within(
            slot.handle.start.remote(slot.cores, self._serve_loaded),
            self._config.start_timeout_s,
            "to start its engine (actors.start_timeout_s)",
        )
        if isinstance(answer, Failure):
            raise ActorLost(str(answer))
        slot.ready = self._serve_loaded
        return float(answer)

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
        while self._broken is None and not any(slot.ready for slot in self._slots):
            await asyncio.wait(
                [slot.repair for slot in self._slots if slot.repair is not None],
                return_when=asyncio.FIRST_COMPLETED,
            )
        if self._broken is not None:
            raise self._broken
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
                slot.handle.sync.remote(info, probe.token_ids),
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
        self._dispatch()
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
        batches: dict[int, list[Request]] = {}
        chosen: list[tuple[int, Slot | None]] = []
        for request in requests:
            order = next(self._arrivals)
            samples = request.sampling.n
            # Older steps go first, also those that wait because they were lost.
            first = not self._queue or (request.step, order) < self._queue[0][:2]
            slot = self._least_loaded(samples) if first else None
            chosen.append((order, slot))
            if slot is not None:
                slot.load += samples
                batches.setdefault(slot.index, []).append(request)
        # One call per actor: its engine sees the whole batch at once, in this order.
        taken = {
            index: asyncio.create_task(self._submit(self._slots[index], batch))
            for index, batch in batches.items()
        }
        return [
            asyncio.create_task(
                self._produce(
                    request, order, arrived, slot, None if slot is None else taken[slot.index]
                )
            )
            for request, (order, slot) in zip(requests, chosen, strict=True)
        ]

    def _least_loaded(self, samples: int) -> Slot | None:
        free = [
            slot
            for slot in self._slots
            if slot.ready and slot.load + samples <= self._config.max_concurrent
        ]
        return min(free, key=lambda slot: (slot.load, slot.index), default=None)

    async def _submit(self, slot: Slot, requests: list[Request]) -> Failure | Exception | None:
        """None when the actor has taken them. Errors are values: many groups wait for this."""
        try:
            answer: Failure | None = await slot.moving(
                slot.handle.submit.remote(requests),
                self._config.group_timeout_s,
                f"to take {len(requests)} groups (actors.group_timeout_s)",
            )
            return answer
        except (ActorLost, RolloutError) as error:
            return error

    async def _produce(
        self,
        request: Request,
        order: int,
        arrived: Arrived | None,
        slot: Slot | None,
        taken: asyncio.Task[Failure | Exception | None] | None,
    ) -> Outcome:
        samples = request.sampling.n
        failure = Failure("infra", f"group {request.group_id} was not generated", "no attempt")
        attempt = 0
        while attempt < MAX_ATTEMPTS:
            if slot is None:
                slot = await self._free_slot(request, order)
            generation = slot.generation
            try:
                if taken is None:
                    taken = asyncio.create_task(self._submit(slot, [request]))
                refused = await asyncio.shield(taken)
                if isinstance(refused, Exception):
                    raise refused
                if refused is None:
                    meta, group = await self._collect(slot, request, attempt, arrived)
                    if isinstance(meta, GroupMeta):
                        slot.failures = 0
                        return meta, group
                    refused = meta
                if isinstance(refused, NotSynced):
                    # Nobody's loss: another takes the group, or this one when it has weights.
                    self._lose(slot, generation, None)
                else:
                    failure = refused
                    if failure.kind == "data":
                        return failure, None
                    if failure.kind == "bug":
                        raise RolloutError(str(failure))
                    attempt += 1
                    self._lose(slot, generation, failure.message)
            except ActorLost as lost:
                failure = Failure("infra", f"group {request.group_id} was lost", str(lost))
                attempt += 1
                self._lose(slot, generation, str(lost))
            except asyncio.CancelledError:
                self._forget(slot, generation, request)
                raise
            finally:
                slot.load -= samples
                self._dispatch()
            slot, taken = None, None
        return failure, None

    async def _collect(
        self, slot: Slot, request: Request, attempt: int, arrived: Arrived | None
    ) -> Outcome:
        name = request.group_id

        async def early(index: int) -> None:
            call = slot.handle.completion.options(num_returns=2)
            failure, group = call.remote(name, index)
            # An actor that dies fails `collect` as well, which tells of it.
            with contextlib.suppress(Exception):
                if await failure is None and arrived is not None:
                    arrived(name, attempt, group)

        count = 0 if arrived is None else request.sampling.n
        waiting = [asyncio.create_task(early(index)) for index in range(count)]
        try:
            meta_ref, group = slot.handle.collect.options(num_returns=2).remote(name)
            meta = await slot.moving(
                meta_ref,
                self._config.group_timeout_s,
                f"while it generated group {name} (actors.group_timeout_s)",
            )
            if waiting:
                await asyncio.wait(waiting, timeout=self._config.group_timeout_s)
            return meta, group
        finally:
            for task in waiting:
                task.cancel()

    def _forget(self, slot: Slot, generation: int, request: Request) -> None:
        """Nobody waits for a group any more: its actor stops generating it."""

        def tell() -> None:
            if slot.generation == generation and slot.repair is None:
                slot.handle.forget.remote(request.group_id)

        asyncio.get_running_loop().call_soon(tell)

    async def _free_slot(self, request: Request, order: int) -> Slot:
        """Wait for an actor with room; the oldest step's groups are served first.

        How long that takes is the engines' business, each of which is watched: only when there is
        none left to wait for is it an error.
        """
        samples = request.sampling.n
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (request.step, order, samples, future))
        self._dispatch()
        try:
            while not (await asyncio.wait({future}, timeout=self._config.group_timeout_s))[0]:
                if not any(s.ready or s.syncing or s.repair for s in self._slots):
                    raise RolloutError(
                        f"group {request.group_id} waited {self._config.group_timeout_s:g} s and "
                        "no rollout actor has weights to generate it with"
                    )
            return future.result()
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                future.result().load -= samples
            raise
        finally:
            future.cancel()
            self._dispatch()

    def _dispatch(self) -> None:
        """Give room that there is now to those who wait, the oldest step first."""
        while self._queue:
            _, _, samples, future = self._queue[0]
            if not future.done():
                if self._broken is not None:
                    future.set_exception(self._broken)
                    continue
                slot = self._least_loaded(samples)
                if slot is None:
                    return
                slot.load += samples
                future.set_result(slot)
            heapq.heappop(self._queue)

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
        import ray

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
                ray.kill(slot.handle)
                slot.handle = self._make_actor(f"rollout-{slot.index}")
                slot.generation += 1
                slot.watch = Watch()
                try:
                    await self._bring_up(slot)
                    return
                except ActorLost as lost:
                    why = str(lost)
        except RolloutError as error:
            self._broken = self._broken or error
        except Exception as error:  # noqa: BLE001 - those who wait must hear of it
            failure = failure_of(error, f"replacing rollout-{slot.index}")
            self._broken = self._broken or RolloutError(str(failure))
        finally:
            slot.repair = None
            self._dispatch()

    async def _bring_up(self, slot: Slot) -> None:
        """Place and start a new actor, with the newest weights."""
        await slot.within(
            slot.handle.place.remote(),
            self._config.start_timeout_s,
            "to be placed by Ray (actors.start_timeout_s)",
        )
        await self._start_engine(slot)
        if not self._serve_loaded:
            await self._pull(slot)

    async def memory(self) -> int:
        """Peak resident bytes of all actors and engines that answer within half a minute."""
        calls = [asyncio.ensure_future(s.handle.memory.remote()) for s in self._slots]
        done, late = await asyncio.wait(calls, timeout=30) if calls else (set(), set())
        for call in late:
            call.cancel()
        return sum(call.result() for call in done if call.exception() is None)

    def kill(self) -> None:
        """End every actor now; their watchers end the engines."""
        import ray

        for slot in self._slots:
            for task in (slot.repair, slot.beats):
                if task is not None:
                    task.cancel()
            ray.kill(slot.handle)
