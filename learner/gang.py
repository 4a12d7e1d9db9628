"""The processes of all ranks: started, watched, ended, and started again beside their copies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import RayError

from cohort.learner.home import LearnerHome, Whereabouts
from cohort.learner.ranks import LearnerError, Ranks, message_of
from cohort.learner.spec import LearnerSpec, ModelFacts
from cohort.learner.worker import LearnerWorker

if TYPE_CHECKING:
    from ray.actor import ActorClass, ActorHandle

# A rank answers from a thread of its own, also while it computes: one that does not for so long,
# and whose process has not computed either, is frozen.
FROZEN_S = 12.0
PULSE_S = 3.0
IDLE_CPU_S = 0.05
# The owner of a machine's memory writes checkpoints in a thread of its own.
WRITING = "writing"
HOME_S = 60.0


class Gang:
    """The ranks of a learner, and on each of their machines the owner of their shared memory.

    Args:
        spec: Of any rank; the rank is filled in here.
        worker: What Ray makes a rank of; see `LearnerWorker`.
        actor_options: Ray options of each rank's actor.
        timeout_s: Longest wait for the actors to be placed, and again for the model to load.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        worker: type[LearnerWorker],
        actor_options: Sequence[Mapping[str, object]],
        timeout_s: float,
    ) -> None:
        self.spec = spec
        self._worker = watched(worker)
        self._options = actor_options
        self._timeout_s = timeout_s
        self._ranks = Ranks([], timeout_s)
        self._places: list[Whereabouts] = []
        self._homes: dict[str, ActorHandle[LearnerHome]] = {}

    async def start(self) -> tuple[Ranks, ModelFacts]:
        """Start the ranks; once more when one is lost on the way."""
        try:
            return await self._start()
        except LearnerError as error:
            if not error.lost:
                raise
        return await self.again()

    async def again(self) -> tuple[Ranks, ModelFacts]:
        """End what is left of the ranks, and start them where they were. Their state is that of
        the model folder."""
        await self._end_ranks()
        return await self._start()

    def first_on_their_machines(self) -> list[bool]:
        """Of each rank, whether no rank before it runs on the same machine."""
        nodes = [place.node_id for place in self._places]
        return [node not in nodes[:rank] for rank, node in enumerate(nodes)]

    async def write(self, generation: int, folder: str) -> None:
        """Have the owners of the memory write the ranks' copies into a checkpoint's folder.

        Raises:
            LearnerError: A part could not be written, or not in time; raised when all have
                finished. The ranks take no part in this and can go on.
        """
        what = "saving a checkpoint"
        calls = [
            self._homes[place.node_id]
            # Not again in one that takes its place: the copies have gone with it.
            .write.options(concurrency_group=WRITING, max_task_retries=0)
            .remote(rank, generation, folder)
            for rank, place in enumerate(self._places)
        ]
        limit = self.spec.learner.step_timeout_s
        try:
            async with asyncio.timeout(limit):
                found = await asyncio.gather(*map(_done, calls), return_exceptions=True)
        except TimeoutError:
            # What is late must not write into the folder of a later try.
            for home in self._homes.values():
                ray.kill(home, no_restart=False)
            raise LearnerError(f"{what} behind the learner took more than {limit} s") from None
        for rank, error in enumerate(found):
            if error is not None:
                raise LearnerError(f"learner rank {rank} failed {what}: {message_of(error)}")

    def kill(self) -> None:
        """End all ranks at once, then the owners of their memory, which goes with them."""
        self._ranks.kill()
        for home in self._homes.values():
            ray.kill(home)

    async def _start(self) -> tuple[Ranks, ModelFacts]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        handles = []
        for rank, options in enumerate(self._options):
            if self._places:
                node = self._places[rank].node_id
                options = {
                    **options,
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
                }
            handles.append(self._worker.options(**options).remote(replace(self.spec, rank=rank)))
        # To Ray's type hints a handle may be the class as well, so that editors know its methods.
        ranks = Ranks(cast("list[ActorHandle[LearnerWorker]]", handles), self._timeout_s)
        self._ranks = ranks
        try:
            await ranks.ready()
            places = await ranks.all("saying where it is", LearnerWorker.whereabouts)
            await self._settle(places)
            first = Ranks(ranks.handles[:1], self._timeout_s)
            [(address, port)] = await first.all("opening the rendezvous", LearnerWorker.rendezvous)
            facts = await ranks.all(
                "loading the model", LearnerWorker.setup, address, port, self._timeout_s
            )
        except BaseException:
            ranks.kill()
            raise
        # What was tried need not be tried again, and its folder is removed by now.
        self.spec = replace(self.spec, trial_dir=None)
        ranks.timeout_s = self.spec.learner.step_timeout_s
        ranks.watch = self._until_one_is_frozen
        return ranks, facts[0]

    async def _settle(self, places: list[Whereabouts]) -> None:
        """Have an owner of the shared memory on every machine of a rank."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._places = places
        # Ray's types do not know this option.
        owner = ray.remote(concurrency_groups={WRITING: 1})(LearnerHome)  # type: ignore[call-overload]
        for node in dict.fromkeys(place.node_id for place in places):
            if node not in self._homes:
                # Ray starts it again when it dies; the ranks then copy into a new folder.
                home = owner.options(
                    num_cpus=0,
                    max_restarts=-1,
                    max_task_retries=-1,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                ).remote(self.spec.shm_dir, self.spec.trial_dir is not None)
                self._homes[node] = cast("ActorHandle[LearnerHome]", home)

    async def _end_ranks(self) -> None:
        self._ranks.kill()
        for node, home in list(self._homes.items()):
            try:
                there = [place for place in self._places if place.node_id == node]
                await asyncio.wait_for(home.end.remote(there), HOME_S)
            except (RayError, TimeoutError):
                # The machine is gone, and what ran there with it.
                del self._homes[node]

    async def _until_one_is_frozen(self) -> str:
        """Ends with words for a rank that is frozen; a dead one shows in the call itself."""
        watches = [
            asyncio.ensure_future(self._frozen(rank)) for rank in range(len(self._ranks.handles))
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _frozen(self, rank: int) -> str:
        """Ends when this rank neither answers nor computes."""
        handle, place = self._ranks.handles[rank], self._places[rank]
        home = self._homes[place.node_id]
        while True:
            await asyncio.sleep(PULSE_S)
            try:
                before = await home.cpu_seconds.remote(place.pid)
                try:
                    await asyncio.wait_for(_answer_of(handle), FROZEN_S)
                except TimeoutError:
                    if await home.cpu_seconds.remote(place.pid) - before < IDLE_CPU_S:
                        return f"rank {rank} is frozen: it has not answered for {FROZEN_S:g} s"
            except RayError:
                # It died, or its machine did: the call itself ends with that.
                await asyncio.get_running_loop().create_future()


async def _done(call: Awaitable[None]) -> None:
    await call


async def _answer_of(handle: ActorHandle[LearnerWorker]) -> bool:
    return await handle.pulse.remote()


def watched(worker: type[LearnerWorker]) -> ActorClass[LearnerWorker]:
    """The class for Ray's actors of a rank that answers `pulse` while it computes."""

    @ray.method(concurrency_group="watch")
    def pulse(self: LearnerWorker) -> bool:
        return worker.pulse(self)

    answering = type(worker.__name__, (worker,), {"pulse": pulse})
    # Ray's types do not know this option.
    return ray.remote(concurrency_groups={"watch": 1})(answering)  # type: ignore[call-overload]
