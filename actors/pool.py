"""RolloutPool: many rollout actors as one thing that turns requests into groups.

Requests go to the least loaded actor that has room; what an actor loses is generated again by
another one; an actor that died is replaced by a new one, which pulls the current weights before it
may generate. Everything here runs in the driver's asyncio loop and sees sizes and references, never
tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.config import ActorsConfig
from actors.records import Failure, GroupMeta, WeightsInfo
from actors.rollout import Place, Request, split_cores

MAX_ATTEMPTS = 3
# Of one actor in a row, without a group between them: then the fault is not in the process.
MAX_RESTARTS = 3

Outcome = tuple[GroupMeta | Failure, Any]
# (group id, attempt, reference to a group of one): a completion that is there before its group is.
Arrived = Callable[[str, int, Any], None]


class RolloutError(Exception):
    """The pool cannot go on; the message says which actor, what happened, what to change."""


@dataclass(frozen=True)
class Probe:
    """A token sequence that learner and engines score under the same weights, to compare.

    logprobs: the learner's, of tokens 1..n-1. tolerance: largest mean absolute difference that an
    engine may show, in nats.
    """

    token_ids: list[int]
    logprobs: list[float]
    tolerance: float


@dataclass
class _Slot:
    """A place in the pool; the actor in it may be replaced."""

    index: int
    handle: Any
    cores: tuple[int, ...] = ()
    load: int = 0
    ready: bool = False
    failures: int = 0
    generation: int = 0
    repair: asyncio.Lock = field(default_factory=asyncio.Lock)


def probe_gap(learner: list[float], engine: list[float]) -> float:
    """Mean absolute difference between two scorings of the same tokens, in nats."""
    gaps = [abs(ours - theirs) for ours, theirs in zip(learner, engine, strict=True)]
    return sum(gaps) / len(gaps)


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
        self._slots: list[_Slot] = []
        self._room = asyncio.Condition()
        self._published: tuple[WeightsInfo, Probe] | None = None
        self._serve_loaded = False
        self.places: list[Place] = []
        self.restarts = 0

    async def start(self, place_timeout_s: float, serve_loaded: bool = False) -> list[float]:
        """Place every actor, give each its cores, start all engines; seconds each took.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        Raises RolloutError naming the actor and the engine's own last words.
        """
        self._serve_loaded = serve_loaded
        self._slots = [
            _Slot(index, self._make_actor(f"rollout-{index}"))
            for index in range(self._config.count)
        ]
        self.places = await asyncio.gather(
            *(
                _wait(
                    slot.handle.place.remote(),
                    place_timeout_s,
                    f"Ray to place rollout actor {slot.index} of {self._config.count} "
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
        try:
            return list(await asyncio.gather(*(self._start_engine(slot) for slot in self._slots)))
        except _ActorLost as lost:
            # Nothing ran yet: what fails now is most likely the setup, which a retry repeats.
            raise RolloutError(str(lost)) from None

    async def _start_engine(self, slot: _Slot) -> float:
        answer = await self._ask(
            slot,
            slot.handle.start.remote(slot.cores, self._serve_loaded),
            self._config.start_timeout_s,
            "to start its engine (actors.start_timeout_s)",
        )
        if isinstance(answer, Failure):
            raise _ActorLost(f"{answer.what}: {answer.message}")
        slot.ready = self._serve_loaded
        return float(answer)

    async def sync(self, info: WeightsInfo, probe: Probe) -> float:
        """Bring every actor to a published version; the largest probe gap, in nats.

        An actor that died or failed meanwhile is replaced; the new one pulls the same version.
        Raises RolloutError when an engine scores the probe differently from the learner: it is
        not serving the weights that were published.
        """
        self._published = (info, probe)
        gaps = await asyncio.gather(*(self._sync_or_replace(slot) for slot in self._slots))
        return max(gaps)

    async def _sync_or_replace(self, slot: _Slot) -> float:
        generation = slot.generation
        try:
            return await self._sync_one(slot)
        except _ActorLost as lost:
            return await self._replace(slot, generation, str(lost))

    async def _sync_one(self, slot: _Slot) -> float:
        if self._published is None:
            raise RolloutError("no weights have been published yet")
        info, probe = self._published
        answer = await self._ask(
            slot,
            slot.handle.sync.remote(info, probe.token_ids),
            self._config.sync_timeout_s,
            f"to load weights {info.version} (actors.sync_timeout_s)",
        )
        if isinstance(answer, Failure):
            text = f"{answer.what}: {answer.message}"
            raise RolloutError(text) if answer.kind == "data" else _ActorLost(text)
        gap = probe_gap(probe.logprobs, answer)
        if not gap <= probe.tolerance:
            raise RolloutError(
                f"rollout-{slot.index} does not serve the weights that were published: its "
                f"log-probs on the probe sequence differ from the learner's by {gap:.4f} on "
                f"average after weights version {info.version}, and the limit is "
                f"{probe.tolerance:g} (actors.probe_tolerance)"
            )
        async with self._room:
            slot.ready = True
            self._room.notify_all()
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
        chosen: list[_Slot | None] = []
        for request in requests:
            slot = self._least_loaded(request.sampling.n)
            chosen.append(slot)
            if slot is not None:
                slot.load += request.sampling.n
                batches.setdefault(slot.index, []).append(request)
        # One call per actor: its engine sees the whole batch at once, in this order.
        taken = {
            index: asyncio.ensure_future(self._submit(self._slots[index], batch))
            for index, batch in batches.items()
        }
        return [
            asyncio.create_task(
                self._produce(request, arrived, slot, None if slot is None else taken[slot.index])
            )
            for request, slot in zip(requests, chosen, strict=True)
        ]

    def _least_loaded(self, samples: int) -> _Slot | None:
        free = [
            slot
            for slot in self._slots
            if slot.ready and slot.load + samples <= self._config.max_concurrent
        ]
        return min(free, key=lambda slot: (slot.load, slot.index), default=None)

    async def _submit(self, slot: _Slot, requests: list[Request]) -> Failure | None:
        return await self._ask(
            slot,
            slot.handle.submit.remote(requests),
            self._config.sync_timeout_s,
            f"to take {len(requests)} groups (actors.sync_timeout_s)",
        )

    async def _produce(
        self,
        request: Request,
        arrived: Arrived | None,
        slot: _Slot | None,
        taken: asyncio.Future[Failure | None] | None,
    ) -> Outcome:
        samples = request.sampling.n
        failure = Failure("infra", f"group {request.group_id} was not generated", "no attempt")
        for attempt in range(MAX_ATTEMPTS):
            if slot is None:
                slot = await self._free_slot(samples)
            generation = slot.generation
            try:
                if taken is None:
                    taken = asyncio.ensure_future(self._submit(slot, [request]))
                refused = await taken
                if refused is None:
                    meta, group = await self._collect(slot, request, attempt, arrived)
                    if isinstance(meta, GroupMeta):
                        slot.failures = 0
                        return meta, group
                    refused = meta
                failure = refused
                if failure.kind == "data":
                    return failure, None
                await self._replace(slot, generation, failure.message)
            except _ActorLost as lost:
                failure = Failure("infra", f"group {request.group_id} was lost", str(lost))
                await self._replace(slot, generation, str(lost))
            finally:
                async with self._room:
                    slot.load -= samples
                    self._room.notify_all()
            slot, taken = None, None
        return failure, None

    async def _collect(
        self, slot: _Slot, request: Request, attempt: int, arrived: Arrived | None
    ) -> Outcome:
        name = request.group_id

        async def early(index: int) -> None:
            call = slot.handle.completion.options(num_returns=2)
            failure, group = call.remote(name, index)
            if await failure is None and arrived is not None:
                arrived(name, attempt, group)

        count = 0 if arrived is None else request.sampling.n
        # An actor that dies fails `collect` as well, which tells of it.
        waiting = asyncio.gather(*map(early, range(count)), return_exceptions=True)
        try:
            meta_ref, group = slot.handle.collect.options(num_returns=2).remote(name)
            meta = await self._ask(
                slot,
                meta_ref,
                self._config.group_timeout_s,
                f"to generate group {name} (actors.group_timeout_s)",
            )
            await self._ask(slot, waiting, self._config.group_timeout_s, "to hand over completions")
            return meta, group
        finally:
            waiting.cancel()

    async def _free_slot(self, samples: int) -> _Slot:
        async with self._room:
            while True:
                slot = self._least_loaded(samples)
                if slot is not None:
                    slot.load += samples
                    return slot
                await _wait(
                    self._room.wait(),
                    self._config.group_timeout_s,
                    "a rollout actor with room for a group (actors.group_timeout_s)",
                )

    async def _ask(self, slot: _Slot, reference: Any, timeout_s: float, what: str) -> Any:
        from ray.exceptions import RayActorError

        try:
            return await asyncio.wait_for(reference, timeout_s)
        except TimeoutError:
            raise _ActorLost(f"rollout-{slot.index} took over {timeout_s:.0f} s {what}") from None
        except RayActorError as error:
            raise _ActorLost(f"rollout-{slot.index} died: {error}") from None

    async def _replace(self, slot: _Slot, generation: int, why: str) -> float:
        """Put a new actor into a slot, once for all the groups that noticed the old one's end."""
        import ray

        async with slot.repair:
            if slot.generation != generation:
                return 0.0
            while True:
                slot.ready = False
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
                try:
                    return await self._bring_up(slot)
                except _ActorLost as lost:
                    why = str(lost)

    async def _bring_up(self, slot: _Slot) -> float:
        """Place and start a new actor, with the current weights; the probe's gap, in nats."""
        await self._ask(
            slot,
            slot.handle.place.remote(),
            self._config.start_timeout_s,
            "to be placed by Ray (actors.start_timeout_s)",
        )
        await self._start_engine(slot)
        return 0.0 if self._serve_loaded else await self._sync_one(slot)

    async def memory(self) -> int:
        """Peak resident bytes of all actors and engines."""
        return sum(
            [await _wait(s.handle.memory.remote(), 30, "an actor's memory") for s in self._slots]
        )

    def kill(self) -> None:
        """End every actor now; their watchers end the engines."""
        import ray

        for slot in self._slots:
            ray.kill(slot.handle)


class _ActorLost(Exception):
    """An actor died or did not answer in time."""


async def _wait(awaitable: Any, timeout_s: float, what: str) -> Any:
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except TimeoutError:
        raise RolloutError(f"waited {timeout_s:.0f} s for {what}") from None
