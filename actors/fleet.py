"""Fleet: the rollout actors of a run, each in its slot, from their start to their end.

A slot's actor starts, pulls the published weights, proves that it serves them, and is ready. One
that is lost is replaced in the background. One that fails again and again is retired, and the run
goes on with the others, down to one. The last one is tried until `actors.start_timeout_s` have
passed; then the run ends, and what it has learned is saved. Engines pull each by themselves: who is
late or in repair is not waited for as long as another can go on.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cohort.actors.config import ActorsConfig
from cohort.actors.dispatch import Dispatcher
from cohort.actors.errors import failure_of
from cohort.actors.handle import RolloutHandle
from cohort.actors.probe import Probe, limit_of, probe_gap, stale
from cohort.actors.records import Failure, WeightsInfo
from cohort.actors.slot import ActorLost, RolloutError, Slot, divide_cores
from cohort.actors.watch import BEAT_S
from cohort.actors.witness import Witnesses

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from cohort.actors.rollout import RolloutActor

# Replacements of one slot's actor in a row, without a group in between. What fails after them is
# not bad luck.
MAX_RESTARTS = 3
# When an engine serves new weights, the others have this many times as long as it took, and no less
# than this, before the run goes on without them.
LATE_FACTOR, LATE_S = 3.0, 2.0
# Between two tries to start the last actor; doubled each time, up to the second.
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0

MakeActor = Callable[[str], "ActorProxy[RolloutActor]"]


class Fleet:
    """The rollout actors of a run.

    Args:
        make_actor: Makes the Ray actor of this name.
        config: The `actors` section.
        notify: Tells the user, in a line, what became of an actor.
        cores: That engines may use of their machine; empty: all.

    Attributes:
        slots: Those that serve, start or are repaired.
        dispatcher: Gives them groups.
        restarts: Actors replaced so far.
        retired: Slots given up so far.
    """

    def __init__(
        self,
        make_actor: MakeActor,
        config: ActorsConfig,
        notify: Callable[[str], None],
        cores: tuple[int, ...] = (),
    ) -> None:
        self._make_actor = make_actor
        self._config = config
        self._notify = notify
        self._cores = cores
        self.slots: list[Slot] = []
        self.dispatcher = Dispatcher(self.slots, config.max_concurrent, config.group_timeout_s)
        self._witnesses = Witnesses()
        self._published: tuple[WeightsInfo, Probe] | None = None
        self._probe_before: Probe | None = None
        self._first_gap: float | None = None
        self._serve_loaded = False
        self._leaving: set[asyncio.Task[None]] = set()
        self.restarts = 0
        self.retired = 0

    async def start(self, place_timeout_s: float, serve_loaded: bool = False) -> list[float]:
        """Place every actor, give each its cores, start all engines; seconds each took.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        Raises RolloutError naming the actor and the engine's own last words.
        """
        self._serve_loaded = serve_loaded
        self.slots += [self._slot(index) for index in range(self._config.count)]
        what = (
            f"to be placed by Ray, one of {self._config.count} actors "
            "(cluster.start_timeout_s; actors.count may exceed the cluster)"
        )
        try:
            await asyncio.gather(
                *(self._find_place(slot, place_timeout_s, what) for slot in self.slots)
            )
            divide_cores(self.slots)
            return list(await asyncio.gather(*map(self._start_engine, self.slots)))
        except ActorLost as lost:
            # Nothing ran yet: what fails now is most likely the setup, which a retry repeats.
            raise RolloutError(str(lost)) from None

    def _slot(self, index: int) -> Slot:
        limits = (self._config.group_timeout_s, self._config.sync_timeout_s)
        return Slot(
            index,
            RolloutHandle(self._make_actor(f"rollout-{index}")),
            self._witnesses,
            beat_s=min(BEAT_S, min(limits) / 5),
            pause_s=self._config.sync_timeout_s,
        )

    async def _find_place(self, slot: Slot, timeout_s: float, what: str) -> None:
        place = await slot.within(slot.handle.place(), timeout_s, what)
        slot.place = replace(place, cores=self._cores or place.cores)
        self._witnesses.meet([slot.place])

    async def _start_engine(self, slot: Slot) -> float:
        answer = await slot.within(
            slot.handle.start(slot.cores, self._serve_loaded),
            self._config.start_timeout_s,
            "to start its engine (actors.start_timeout_s)",
        )
        if isinstance(answer, Failure):
            raise ActorLost(str(answer))
        if self._serve_loaded:
            slot.ready, slot.version = True, 0
        return answer

    async def sync(self, info: WeightsInfo, probe: Probe) -> float:
        """Have every actor pull a published version; the largest probe gap, in nats.

        Waits for as few of them as the next step needs: with `actors.max_staleness` of 1 or more
        for none that has weights already; with 0 for all, but not for one that takes much longer
        than another. An actor that was lost meanwhile is replaced; it, and one that is being
        replaced, pulls the newest version when it is up.

        Raises:
            RolloutError: An engine does not serve the weights that were published, now or at the
                update before; or there is no actor left.
        """
        if self._published is not None and self._published[0].version != info.version:
            self._probe_before = self._published[1]
        self._published = (info, probe)
        for slot in self.slots:
            self._update(slot)
        await self._enough_serve(info.version - self._config.max_staleness)
        if self.dispatcher.broken is not None:
            raise self.dispatcher.broken
        return max(slot.gap for slot in self.slots if slot.ready)

    async def _enough_serve(self, oldest: int) -> None:
        """Wait until actors with weights of this version or newer ones can go on."""
        began = time.monotonic()
        until: float | None = None
        while self.dispatcher.broken is None:
            behind = [
                slot
                for slot in self.slots
                if slot.leaving or not slot.ready or slot.version < oldest
            ]
            if len(behind) == len(self.slots):
                await _first_of(task for slot in behind for task in (slot.pulling, slot.repair))
                continue
            now = time.monotonic()
            if until is None:
                until = now + max(LATE_S, LATE_FACTOR * (now - began))
            pulling = [
                slot.pulling for slot in behind if slot.pulling is not None and not slot.leaving
            ]
            if not pulling or now >= until:
                return
            await _first_of(pulling, until - now)

    def _update(self, slot: Slot) -> None:
        """Have an actor pull the newest version, unless it does so already or is in repair."""
        if slot.repair is None and slot.pulling is None:
            slot.pulling = asyncio.create_task(self._catch_up(slot, slot.generation))

    async def _catch_up(self, slot: Slot, generation: int) -> None:
        slot.updating = True
        late = asyncio.get_running_loop().call_later(LATE_S, self._is_late, slot)
        try:
            with self._told(f"updating rollout-{slot.index}"):
                try:
                    await self._pull(slot)
                except ActorLost as lost:
                    self.lose(slot, generation, str(lost))
        finally:
            late.cancel()
            slot.updating = False
            slot.pulling = None
            self.dispatcher.dispatch()

    @staticmethod
    def _is_late(slot: Slot) -> None:
        # From now on groups that need the newest weights go to others.
        slot.updating = False

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
        slot.ready, slot.version = True, info.version
        self.dispatcher.dispatch()
        return self._published is not published

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

    def unsynced(self, slot: Slot, generation: int) -> None:
        """Have an actor that lives and says that it has no weights pull them."""
        if slot.generation == generation:
            slot.ready = False
            self._update(slot)

    def lose(self, slot: Slot, generation: int, why: str) -> None:
        """Replace a slot's actor, once for all the groups that noticed its end."""
        if slot.generation == generation and slot.repair is None and slot in self.slots:
            slot.ready = False
            slot.repair = asyncio.create_task(self._repair(slot, why))

    async def _repair(self, slot: Slot, why: str | None) -> None:
        """Replace a slot's actor until one has weights. why: None: bring up its first one."""
        if slot.pulling is not None:
            # Of the actor that is lost; the new one pulls when it is up.
            slot.pulling.cancel()
        try:
            with self._told(f"replacing rollout-{slot.index}"):
                await self._until_up(slot, why)
        finally:
            slot.repair = None
            self.dispatcher.dispatch()

    async def _until_up(self, slot: Slot, why: str | None) -> None:
        wait = FIRST_WAIT_S
        while True:
            if why is not None:
                slot.fail()
                if slot.leaving:
                    return self._remove(slot)
                if slot.failures > MAX_RESTARTS:
                    if any(other is not slot for other in self.staying):
                        return self._retire(slot, why)
                    self._give_up_in_time(slot, why)
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT_S)
                self.restarts += 1
                self._notify(f"rollout-{slot.index} is replaced: {why}")
                slot.handle.kill()
                slot.replace(RolloutHandle(self._make_actor(f"rollout-{slot.index}")))
            try:
                return await self._bring_up(slot)
            except ActorLost as lost:
                why = str(lost)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """A failure of what a task of the fleet is doing goes to those who wait for groups."""
        try:
            yield
        except RolloutError as error:
            self.dispatcher.fail(error)
        except Exception as error:  # noqa: BLE001 - those who wait must hear of it
            self.dispatcher.fail(RolloutError(str(failure_of(error, doing))))

    def _retire(self, slot: Slot, why: str) -> None:
        """Go on without a slot whose actors keep failing."""
        self._remove(slot)
        self.retired += 1
        self._notify(
            f"rollout-{slot.index} is retired after {slot.failures} failures in a row, and the run "
            f"goes on with {len(self.staying)} of its actors; the last time: {why}"
        )

    def _remove(self, slot: Slot) -> None:
        self.slots.remove(slot)
        slot.give_up()
        slot.handle.kill()
        self.dispatcher.dispatch()

    def _give_up_in_time(self, slot: Slot, why: str) -> None:
        """Raise RolloutError when the last actor that is left has failed for too long."""
        for_s = time.monotonic() - slot.failing_since
        if for_s >= self._config.start_timeout_s:
            raise RolloutError(
                f"no rollout actor is left: rollout-{slot.index} failed {slot.failures} times in a "
                f"row within {for_s:.0f} s (actors.start_timeout_s="
                f"{self._config.start_timeout_s:g} is how long a run waits for one). If memory ran "
                f"out, lower actors.count or actors.kv_cache_gib. The last time: {why}"
            )

    async def _bring_up(self, slot: Slot) -> None:
        """Place and start a new actor, with the newest weights."""
        timeout_s = self._config.start_timeout_s
        await self._find_place(slot, timeout_s, "to be placed by Ray (actors.start_timeout_s)")
        if not slot.cores:
            # A newcomer: it gets its part, and the others theirs when they are replaced.
            divide_cores(self.slots)
        await self._start_engine(slot)
        if not self._serve_loaded:
            await self._pull(slot)

    @property
    def staying(self) -> list[Slot]:
        """The slots of actors that are not about to leave."""
        return [slot for slot in self.slots if not slot.leaving]

    def scale(self, count: int) -> None:
        """Have so many actors. New ones join once they have weights; who leaves ends its groups
        first, for `actors.group_timeout_s` at most, and hands back the others."""
        staying = self.staying
        for slot in staying[count:]:
            slot.leaving = True
            task = asyncio.create_task(self._leave(slot))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        for _ in range(count - len(staying)):
            taken = {slot.index for slot in self.slots}
            slot = self._slot(next(index for index in itertools.count() if index not in taken))
            self.slots.append(slot)
            slot.repair = asyncio.create_task(self._repair(slot, None))

    async def _leave(self, slot: Slot) -> None:
        until = time.monotonic() + self._config.group_timeout_s
        while slot.load and slot in self.slots and time.monotonic() < until:
            await asyncio.sleep(BEAT_S)
        if slot in self.slots:
            for task in (slot.repair, slot.pulling):
                if task is not None:
                    task.cancel()
            self._remove(slot)
        self._notify(f"rollout-{slot.index} has left")

    @property
    def counts(self) -> dict[str, int]:
        """Actors that have weights now; those replaced and slots retired since the start."""
        serving = sum(slot.ready for slot in self.slots)
        return {"serving": serving, "restarts": self.restarts, "retired": self.retired}

    def kill(self) -> None:
        """End every actor now; their watchers end the engines."""
        for leaving in self._leaving:
            leaving.cancel()
        for slot in self.slots:
            for task in (slot.repair, slot.pulling, slot.beats):
                if task is not None:
                    task.cancel()
            slot.handle.kill()
        self._witnesses.kill()


async def _first_of(
    tasks: Iterable[asyncio.Task[None] | None], timeout_s: float | None = None
) -> None:
    """Wait for the first of these tasks that there are."""
    waited = [task for task in tasks if task is not None]
    assert waited, "a slot without weights pulls them or is in repair"
    await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
