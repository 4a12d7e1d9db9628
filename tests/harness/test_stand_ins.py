"""The stand-ins offer what the real ones offer, under the same names, and keep Ray's rules."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError

from cohort.learner.worker import LearnerWorker
from cohort.rewards.environments.process import HostProcess
from cohort.rewards.environments.worker import start_process
from tests.harness import clock
from tests.harness.engine import Vllm, install_vllm
from tests.harness.environments import LocalProcess, start_here
from tests.harness.learner import LocalLearnerWorker
from tests.harness.local_ray import LocalRay
from tests.harness.world import in_cluster

_found = importlib.util.find_spec("vllm")
assert _found is not None
assert _found.submodule_search_locations
VLLM = Path(_found.submodule_search_locations[0])


def parameters(function: Any) -> list[str]:
    """Without what Ray adds once the class was made an actor in this process."""
    return [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"]


def public(cls: type) -> dict[str, Any]:
    return {n: f for n, f in inspect.getmembers(cls, inspect.isfunction) if n[0] != "_"}


def test_a_learner_rank_has_every_method_of_the_real_one() -> None:
    ours, real = public(LocalLearnerWorker), public(LearnerWorker)
    assert set(ours) == set(real)
    for name, function in real.items():
        assert parameters(ours[name]) == parameters(function), name


def vllm_file(name: str) -> Path:
    """A file of the installed vLLM, which is not imported."""
    return VLLM / name


def test_the_engine_asks_of_the_stand_in_what_vllm_has() -> None:
    files = [vllm_file("v1/engine/async_llm.py"), vllm_file("engine/protocol.py")]
    real = {
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(public(Vllm)) <= real


def test_the_names_in_the_place_of_vllms_are_in_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch)
    for module in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        names = [n for n in vars(sys.modules[module]) if n[0] != "_"]
        if not names:
            continue
        path = vllm_file("/".join(module.split(".")[1:]))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert not [n for n in names if n not in file.read_text()], module


def test_a_process_of_environments_has_what_its_worker_asks_of_the_real_one() -> None:
    ours, real = public(LocalProcess), public(HostProcess)
    # `start` is a classmethod, which `start_here` stands in for.
    assert set(ours) == set(real)
    for name, function in real.items():
        assert parameters(ours[name]) == parameters(function), name
    assert parameters(start_here) == parameters(start_process)


class Counter:
    """An actor for these tests."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.log: list[str] = []

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def fail(self) -> None:
        raise KeyError("words")

    def two(self) -> tuple[int, str]:
        return 1, "kept"

    async def slow(self, name: str, seconds: float) -> str:
        self.log.append(f"{name} begins")
        await asyncio.sleep(seconds)
        self.log.append(f"{name} ends")
        return name

    def read(self) -> list[str]:
        return self.log


def test_calls_references_and_errors() -> None:
    async def main(ray: LocalRay) -> None:
        actor = ray.remote(Counter).remote(5)
        first = actor.add.remote(1)
        assert await actor.add.remote(first) == 12  # a reference arrives as its value
        seen, kept = actor.two.options(num_returns=2).remote()
        assert (await seen, ray.get(kept)) == (1, "kept")
        with pytest.raises(KeyError) as error:
            await actor.fail.remote()
        assert isinstance(error.value, RayTaskError)
        kept.lose()
        with pytest.raises(ObjectLostError):
            await kept
        with pytest.raises(ObjectLostError):
            await actor.add.remote(kept)
        # Async methods run beside one another.
        await asyncio.gather(actor.slow.remote("a", 5), actor.slow.remote("b", 3))
        assert await actor.read.remote() == ["a begins", "b begins", "b ends", "a ends"]

    began = time.perf_counter()
    in_cluster(main)
    assert time.perf_counter() - began < 5  # of eight virtual seconds and a start


def test_a_dead_actor_fails_its_calls_and_one_with_restarts_comes_back_empty() -> None:
    async def main(ray: LocalRay) -> None:
        mortal = ray.remote(Counter).remote()
        reborn = ray.remote(Counter).options(max_restarts=-1).remote()
        await mortal.add.remote(1)
        await reborn.add.remote(1)
        waiting = [mortal.slow.remote("x", 60), reborn.slow.remote("x", 60)]
        await asyncio.sleep(1)
        ray.kill(mortal)
        ray.kill("counter-1")
        for reference in waiting:
            with pytest.raises(RayActorError):
                await reference
        with pytest.raises(ActorDiedError):
            await mortal.add.remote(1)
        with pytest.raises(RayActorError):
            await reborn.add.remote(1)  # not back yet
        await asyncio.sleep(5)
        assert await reborn.add.remote(1) == 1

    in_cluster(main)


def test_a_frozen_actor_does_nothing_until_it_is_thawed() -> None:
    async def main(ray: LocalRay) -> None:
        actor = ray.remote(Counter).remote()
        await actor.add.remote(1)
        running = actor.slow.remote("x", 5)
        await asyncio.sleep(1)
        ray.freeze("counter-0")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(actor.add.remote(1), 100)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(running, 100)
        ray.thaw("counter-0")
        assert await running == "x"

    in_cluster(main)


def test_a_program_that_waits_for_ever_is_a_deadlock() -> None:
    async def main(_: LocalRay) -> None:
        await asyncio.Event().wait()

    with pytest.raises(clock.Deadlock):
        in_cluster(main)


def test_real_work_in_a_thread_takes_no_virtual_time_and_is_waited_for() -> None:
    async def main(_: LocalRay) -> tuple[str, float]:
        began = time.monotonic()
        timer = asyncio.create_task(asyncio.sleep(0.01))
        done = await asyncio.to_thread(lambda: time.sleep(0.05) or "done")
        await timer
        return done, time.monotonic() - began

    assert in_cluster(main) == ("done", pytest.approx(0.01))
