"""A pool of real engines, of which some are killed or stopped: who is replaced, and who is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from cohort.actors.config import ActorsConfig
from cohort.actors.engine import EngineSpec
from cohort.actors.pool import RolloutPool
from cohort.actors.probe import Probe
from cohort.actors.records import GroupMeta, Prompt, Request, SamplingSpec
from cohort.actors.rollout import RolloutActor
from cohort.learner.weights import WeightFiles, gather_named_weights, weight_specs
from tests.models import tiny_llama
from tests.system.conftest import is_engine, shared_files

pytestmark = pytest.mark.system

PROBE = list(range(20, 40))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Run:
    """A pool, and the published versions of a model that moves a little each time."""

    def __init__(self, folder: Path, **options: Any) -> None:
        model = tiny_llama(folder / "model")
        config = ActorsConfig(kv_cache_gib=0.25, **options)
        spec = EngineSpec(str(model), "float32", "cpu", 1024, config, seed=0)
        self.notes: list[str] = []

        def make(name: str) -> Any:
            remote = ray.remote(RolloutActor).options(num_cpus=0.1, max_concurrency=1000)
            return remote.remote(name, spec, str(folder / "logs"))

        self.pool = RolloutPool(make, config, self.notes.append)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.files = WeightFiles(folder / "published")
        self.version = -1

    async def publish(self) -> float:
        """Publish another version, bring the pool to it; seconds that took."""
        from cohort.actors.records import WeightsInfo

        self.version += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
            logits = self.model(torch.tensor([PROBE])).logits[0, :-1].float()
            scored = torch.log_softmax(logits, -1).gather(1, torch.tensor(PROBE[1:])[:, None])
        specs = weight_specs(self.model, 0)
        digest, size = self.files.publish(
            self.version, [self.version - 1], specs, gather_named_weights(self.model, 0)
        )
        path, node = str(self.files.path(self.version)), ray.get_runtime_context().get_node_id()
        names = tuple(spec.name for spec in specs)
        info = WeightsInfo(self.version, names, digest, size, path, node)
        began = time.monotonic()
        await self.pool.sync(info, Probe(PROBE, scored[:, 0].tolist(), 0.01, floor=0.001))
        return time.monotonic() - began

    async def begin(self, count: int, samples: int = 8, tokens: int = 300) -> list[Any]:
        step = self.version
        return await self.pool.generate(
            [
                Request(
                    f"{step}:{index}",
                    Prompt(f"p{index}", tuple(range(10, 30)), "p"),
                    SamplingSpec(tokens, 1.0, samples, 100 * index),
                    step=step,
                )
                for index in range(count)
            ]
        )

    async def all_done(self, tasks: list[Any]) -> list[GroupMeta]:
        metas = [(await task)[0] for task in tasks]
        assert all(isinstance(meta, GroupMeta) for meta in metas), metas
        assert len({meta.group_id for meta in metas}) == len(tasks)
        return metas

    async def repaired(self) -> None:
        while not all(slot.ready for slot in self.pool.fleet.slots):
            assert self.pool._dispatcher.broken is None, self.pool._dispatcher.broken
            await asyncio.sleep(0.2)

    async def noticed(self, restarts: int) -> float:
        """Seconds until so many actors have been replaced."""
        began = time.monotonic()
        while self.pool.fleet.restarts < restarts:
            await asyncio.sleep(0.1)
        assert self.pool.fleet.restarts == restarts, self.notes
        return time.monotonic() - began

    async def process(self, index: int) -> psutil.Process:
        """The process of an actor."""
        return psutil.Process((await self.pool.fleet.slots[index].handle.place()).pid)

    async def engine(self, index: int) -> psutil.Process:
        """vLLM's process below an actor."""
        below = (await self.process(index)).children(recursive=True)
        [found] = [p for p in below if is_engine(" ".join(p.cmdline()))]
        return found


def run(folder: Path, main: Callable[[Run], Awaitable[None]], **options: Any) -> None:
    async def program() -> None:
        made = Run(folder, **options)
        try:
            await made.pool.start(120)
            await made.publish()
            await main(made)
        finally:
            made.pool.kill()

    asyncio.run(asyncio.wait_for(program(), 400))


@pytest.mark.exhaustive
def test_two_actors_outlive_each_other(tmp_path: Path) -> None:
    files = shared_files()

    async def main(made: Run) -> None:
        pool = made.pool
        # An engine dies among its groups. The other actor takes them, and updates go on meanwhile.
        tasks = await made.begin(8)
        await asyncio.sleep(0.3)
        (await made.engine(0)).kill()
        await made.all_done(tasks)
        assert pool.fleet.restarts == 1, made.notes
        if not pool.fleet.slots[0].ready:
            assert await made.publish() < 10, "an update waited for a repair"
        await made.repaired()
        assert pool.fleet.restarts == 1, made.notes
        metas = await made.all_done(await made.begin(6))
        assert {meta.weight_versions[0] for meta in metas} == {made.version}
        assert {meta.actor for meta in metas} == {"rollout-0", "rollout-1"}

        # An engine is stopped: nothing tells of it but that nothing happens.
        tasks = await made.begin(8)
        (await made.engine(1)).suspend()
        assert await made.noticed(2) < 15
        assert "rollout-1 is frozen" in made.notes[-1]
        await made.all_done(tasks)
        await made.repaired()

        # The whole actor is stopped, while it is told to load.
        (await made.process(0)).suspend()
        assert await made.publish() < 10, "an update waited for a frozen engine"
        assert await made.noticed(3) < 15
        assert "rollout-0 is frozen" in made.notes[-1]
        await made.repaired()
        assert all(slot.gap < 0.001 for slot in pool.fleet.slots)

    run(tmp_path, main, count=2)
    deadline = time.monotonic() + 20
    while left := shared_files() - files:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.exhaustive
def test_a_healthy_engine_may_take_as_long_as_it_likes(tmp_path: Path) -> None:
    """Far longer than group_timeout_s for a group, and longer still for those that queue."""

    async def main(made: Run) -> None:
        began = time.monotonic()
        tasks = await made.begin(4, samples=64, tokens=900)
        await asyncio.sleep(0.5)
        await made.publish()
        await made.all_done(tasks)
        assert time.monotonic() - began > 8
        assert made.pool.fleet.restarts == 0, made.notes

    run(tmp_path, main, count=1, max_concurrent=64, group_timeout_s=4)
