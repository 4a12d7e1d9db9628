"""RolloutPool and the real RolloutActor through deaths, hangs, updates and queues.

Engines are stand-ins; who waits, who is replaced and what is served is the program's own.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from cohort.actors.config import ActorsConfig
from cohort.actors.engine import EngineError
from cohort.actors.pool import RolloutPool
from cohort.actors.probe import Probe
from cohort.actors.records import Failure, GroupMeta, NotSynced
from cohort.actors.slot import RolloutError
from cohort.actors.watch import BUSY_FACTOR, Look, Watch
from tests.actors.stand_ins import LEARNER, PROBE, Handle, StandInEngine, info, request
from tests.harness import clock

PROBING = Probe(PROBE, LEARNER, tolerance=0.1)
RAY_LOSSES = [
    OutOfMemoryError("killed for memory"),
    ObjectLostError("ff" * 28, None, ""),
    NodeDiedError("node"),
    ActorUnschedulableError("no node"),
    WorkerCrashedError(),
    LocalRayletDiedError(),
]


class Made:
    """Makes actors for a pool, and keeps them. engines: of the first ones, in order."""

    def __init__(self, *engines: StandInEngine, start_s: float = 0.0) -> None:
        self.engines = list(engines)
        self.start_s = start_s
        self.handles: list[Handle] = []
        self.notes: list[str] = []

    def make(self, name: str) -> Handle:
        engine = self.engines.pop(0) if self.engines else None
        # The first ones start at once; a replacement takes its time.
        late = self.start_s if len(self.handles) >= self.first else 0.0
        self.handles.append(Handle(name, engine, late))
        return self.handles[-1]

    async def pool(self, count: int = 2, **options: Any) -> RolloutPool:
        self.first = count
        pool = RolloutPool(self.make, ActorsConfig(count=count, **options), self.notes.append)
        await pool.start(5)
        await pool.sync(info(0), PROBING)
        return pool


@pytest.fixture(autouse=True)
def _kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda handle: handle.kill())


def run(main: Any, seconds: float = 20) -> Any:
    """Run to the end; every exception that nobody saw is an error."""
    unseen: list[dict[str, Any]] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unseen.append(what))
        result = await asyncio.wait_for(main, seconds)
        await asyncio.sleep(0)
        return result

    result = clock.run(watched())
    assert not unseen, unseen
    return result


async def outcomes(pool: RolloutPool, *names: str, **options: Any) -> list[Any]:
    tasks = await pool.generate([request(name, **options) for name in names])
    return [(await task)[0] for task in tasks]


@pytest.mark.parametrize("error", RAY_LOSSES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("when", ["submit", "collect", "sync"])
def test_every_loss_that_ray_reports_replaces_the_actor(error: Exception, when: str) -> None:
    async def main() -> None:
        made = Made()
        pool = await made.pool()
        victim = made.handles[0]

        async def lose(*_: Any) -> Any:
            raise error

        getattr(victim, when)._call = lose
        if when == "sync":
            await pool.sync(info(1), PROBING)
        got = await outcomes(pool, "a", "b", "c", "d")
        assert all(isinstance(meta, GroupMeta) for meta in got), got
        assert pool.fleet.restarts == 1
        assert victim.dead.is_set()

    run(main())


@pytest.mark.parametrize("when", ["submit", "collect", "sync", "start"])
def test_a_mistake_in_the_actors_program_ends_the_run_with_its_traceback(when: str) -> None:
    async def main() -> None:
        made = Made()
        pool = await made.pool(count=1)

        async def wrong(*_: Any) -> Any:
            raise RayTaskError("f", "Traceback: line 7 in f\nKeyError: 'x'", KeyError("x"))

        getattr(made.handles[0], when)._call = wrong
        if when == "start":
            await pool.fleet._start_engine(pool.fleet.slots[0])
        if when == "sync":
            await pool.sync(info(1), PROBING)
        try:
            await outcomes(pool, "a")
        finally:
            assert pool.fleet.restarts == 0

    with pytest.raises(RolloutError, match="line 7 in f"):
        run(main())


def test_groups_that_queue_during_an_update_wait_for_it_and_nobody_is_replaced() -> None:
    """As in overlapped training: more groups than the engine takes, and updates meanwhile."""

    async def main() -> None:
        made = Made(StandInEngine(load_s=0.02))
        pool = await made.pool(count=1, max_concurrent=4)
        tasks = await pool.generate([request(f"g{i}") for i in range(12)])
        for version in range(1, 6):
            await asyncio.sleep(0.005)
            await pool.sync(info(version), PROBING)
        got = [(await task)[0] for task in tasks]
        assert all(isinstance(meta, GroupMeta) for meta in got)
        assert pool.fleet.restarts == 0
        assert made.handles[0].engine.peak <= 4

    run(main())


def test_a_submit_during_an_update_is_generated_with_the_new_weights() -> None:
    async def main() -> None:
        handle = Handle("r", StandInEngine(load_s=0.05))
        await handle.actor.sync(info(0), PROBE)
        update = asyncio.ensure_future(handle.actor.sync(info(1), PROBE))
        await asyncio.sleep(0.01)
        assert await handle.actor.submit([request("a")]) is None
        meta, _ = await handle.actor.collect("a")
        assert isinstance(meta, GroupMeta)
        assert meta.weight_versions == (1, 1)
        assert await update == LEARNER

    run(main())


def test_an_actor_whose_update_failed_says_not_synced_and_takes_the_next() -> None:
    async def main() -> None:
        engine = StandInEngine(load_s=0.02)
        engine.fail_load[1] = EngineError("torn")
        handle = Handle("r", engine)
        assert await handle.actor.sync(info(0), PROBE) == LEARNER
        update = asyncio.ensure_future(handle.actor.sync(info(1), PROBE))
        await asyncio.sleep(0.005)
        assert isinstance(await handle.actor.submit([request("a")]), NotSynced)
        assert isinstance(await update, Failure)
        assert await handle.actor.sync(info(2), PROBE) == LEARNER
        assert await handle.actor.submit([request("a")]) is None

    run(main())


def test_of_two_updates_at_once_the_newer_wins_in_either_order() -> None:
    async def main(order: tuple[int, int]) -> None:
        handle = Handle("r", StandInEngine(load_s=0.01))
        await handle.actor.sync(info(0), PROBE)
        answers = await asyncio.gather(*(handle.actor.sync(info(v), PROBE) for v in order))
        assert handle.engine.version == 2
        refused = [a for a in answers if isinstance(a, Failure)]
        assert len(refused) == (order == (2, 1))
        assert all("older" in failure.message for failure in refused)

    for order in ((1, 2), (2, 1)):
        run(main(order))


def test_not_synced_is_a_reason_to_wait_not_to_replace() -> None:
    async def main() -> None:
        made = Made()
        pool = await made.pool(count=1)
        made.handles[0].actor._version = -1
        got = await outcomes(pool, "a")
        assert isinstance(got[0], GroupMeta)
        assert pool.fleet.restarts == 0
        assert made.handles[0].engine.loads == [0, 0]

    run(main())


def test_an_update_leaves_an_actor_in_repair_alone_and_it_comes_up_with_the_newest() -> None:
    async def main() -> None:
        made = Made(start_s=0.3)
        pool = await made.pool()
        made.handles[0].kill()
        assert all(isinstance(m, GroupMeta) for m in await outcomes(pool, "a", "b"))
        began = asyncio.get_running_loop().time()
        for version in (1, 2, 3):
            await pool.sync(info(version), PROBING)
        assert asyncio.get_running_loop().time() - began < 0.25, "it waited for the repair"
        assert not any(name == "sync" for name, _ in made.handles[2].calls)
        await pool.fleet.slots[0].repair
        # One restart for one death, one load: of the newest.
        assert pool.fleet.restarts == 1
        assert made.handles[2].engine.loads == [3]
        assert made.handles[1].engine.loads == [0, 1, 2, 3]

    run(main())


def test_an_update_waits_when_no_actor_can_go_on() -> None:
    async def main() -> None:
        made = Made(start_s=0.1)
        pool = await made.pool(count=1)
        made.handles[0].kill()
        tasks = await pool.generate([request("a")])
        await asyncio.sleep(0.02)
        await pool.sync(info(1), PROBING)
        assert made.handles[1].engine.loads == [1]
        assert isinstance((await tasks[0])[0], GroupMeta)
        assert pool.fleet.restarts == 1

    run(main())


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_update_waits_for_no_engine_that_the_next_step_does_not_need(staleness: int) -> None:
    """With staleness 0 for none that takes far longer than another, with more for none at all."""

    async def main() -> None:
        made = Made(StandInEngine(load_s=1.0), StandInEngine(load_s=1.0))
        pool = await made.pool(max_staleness=staleness)
        made.handles[1].engine.load_s = 60.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        await pool.sync(info(1), PROBING)
        took = loop.time() - began
        assert took == pytest.approx(4.0 if staleness == 0 else 0.0, abs=0.1)
        # What needs the new weights goes to who has them, what does not to either.
        await asyncio.sleep(3)
        began = loop.time()
        new = await outcomes(pool, "a", "b", "c", "d", oldest=1)
        assert {meta.actor for meta in new} == {"rollout-0"}
        assert {meta.weight_versions for meta in new} == {(1, 1)}
        assert loop.time() - began < 1
        # It joins again once it has loaded them.
        await asyncio.sleep(60)
        assert pool.fleet.slots[1].version == 1

    run(main(), 200)


def test_a_group_is_never_begun_with_weights_older_than_it_asks_for() -> None:
    """Also when it reaches an actor before the update that it waits for."""

    async def main() -> None:
        handle = Handle("r", StandInEngine(load_s=0.05))
        await handle.actor.sync(info(0), PROBE)
        handed = asyncio.ensure_future(handle.actor.submit([request("a", oldest=2)]))
        await asyncio.sleep(1)
        await handle.actor.sync(info(1), PROBE)
        await asyncio.sleep(1)
        assert not handed.done()
        await handle.actor.sync(info(2), PROBE)
        assert await handed is None
        meta, _ = await handle.actor.collect("a")
        assert meta.weight_versions == (2, 2)

    run(main())


def test_a_version_published_while_a_replacement_loads_is_loaded_after_it() -> None:
    async def main() -> None:
        slow = StandInEngine(load_s=0.1)
        made = Made(StandInEngine(), StandInEngine(), slow)
        pool = await made.pool()
        made.handles[0].kill()
        await outcomes(pool, "a", "b")
        await asyncio.sleep(0.05)
        await pool.sync(info(1), PROBING)
        await pool.fleet.slots[0].repair
        assert slow.loads == [0, 1]
        assert pool.fleet.restarts == 1

    run(main())


def test_a_replacement_whose_version_is_gone_takes_the_newest_and_is_not_replaced() -> None:
    """Its file was written over while it loaded: there is a newer one."""

    async def main() -> None:
        slow = StandInEngine(load_s=0.1)
        slow.fail_load[0] = EngineError("the file is gone")
        made = Made(StandInEngine(), StandInEngine(), slow)
        pool = await made.pool()
        made.handles[0].kill()
        await outcomes(pool, "a", "b")
        await asyncio.sleep(0.05)
        await pool.sync(info(1), PROBING)
        await pool.fleet.slots[0].repair
        assert slow.loads == [1]
        assert pool.fleet.restarts == 1

    run(main())


def test_groups_of_a_dead_actor_go_to_the_other_one_at_once() -> None:
    async def main() -> None:
        made = Made(start_s=5)
        pool = await made.pool()
        tasks = await pool.generate([request(f"g{i}") for i in range(6)])
        await asyncio.sleep(0.002)
        made.handles[0].kill()
        began = asyncio.get_running_loop().time()
        got = [(await task)[0] for task in tasks]
        assert asyncio.get_running_loop().time() - began < 2
        assert {meta.actor for meta in got} == {"rollout-1"}
        pool.kill()

    run(main())


@pytest.mark.parametrize("what", ["engine", "actor"])
def test_one_that_stands_still_is_replaced_soon(what: str) -> None:
    async def main() -> None:
        made = Made()
        pool = await made.pool(count=1, group_timeout_s=0.2)
        tasks = await pool.generate([request("a", tokens=50), request("b")])
        await asyncio.sleep(0.02)
        if what == "engine":
            made.handles[0].engine.frozen = True
        else:
            made.handles[0].stopped = True
        began = asyncio.get_running_loop().time()
        got = await asyncio.gather(*tasks)
        assert all(isinstance(meta, GroupMeta) for meta, _ in got)
        assert asyncio.get_running_loop().time() - began < 1.5
        assert pool.fleet.restarts == 1
        assert "no progress for 0.2 s" in made.notes[0]

    run(main())


def test_a_slow_healthy_engine_is_left_alone_and_so_is_the_queue_behind_it() -> None:
    """Each group takes four times `group_timeout_s`, the last one waits for all before it."""

    async def main() -> None:
        made = Made(StandInEngine(token_s=0.02))
        pool = await made.pool(count=1, group_timeout_s=0.2, max_concurrent=2)
        got = await outcomes(pool, "a", "b", "c", tokens=40)
        assert all(isinstance(meta, GroupMeta) for meta in got)
        assert pool.fleet.restarts == 0

    run(main())


def test_a_long_update_is_no_reason_to_replace_an_engine_with_groups() -> None:
    async def main() -> None:
        made = Made(StandInEngine(load_s=0.6))
        pool = await made.pool(count=1, group_timeout_s=0.2, sync_timeout_s=2)
        tasks = await pool.generate([request("a", tokens=100)])
        await asyncio.sleep(0.02)
        await pool.sync(info(1), PROBING)
        assert isinstance((await tasks[0])[0], GroupMeta)
        assert pool.fleet.restarts == 0

    run(main())


def test_what_waits_is_served_oldest_step_first_also_what_was_lost() -> None:
    served: list[str] = []

    async def main() -> None:
        made = Made()
        pool = await made.pool(count=1, max_concurrent=2)
        old = await pool.generate([request("old", step=3)])
        await asyncio.sleep(0.002)
        new = await pool.generate([request(f"new{i}", step=4) for i in range(4)])
        made.handles[0].kill()
        await asyncio.sleep(0)
        # A refill of the older step, drawn late.
        new += await pool.generate([request("refill", step=3)])
        await asyncio.gather(*old, *new)
        for name, arguments in made.handles[1].calls:
            if name == "submit":
                served.extend(r.group_id for r in arguments[0])

    run(main())
    assert served == ["old", "refill", "new0", "new1", "new2", "new3"]


def test_a_bad_prompt_fails_alone() -> None:
    async def main() -> None:
        engine = StandInEngine()
        engine.refuse["g1"] = ValueError("2000 tokens are too many")
        made = Made(engine)
        pool = await made.pool(count=1)
        got = await outcomes(pool, "g0", "g1", "g2")
        assert [isinstance(meta, GroupMeta) for meta in got] == [True, False, True]
        assert got[1].kind == "data"
        assert "2000 tokens" in got[1].message
        assert pool.fleet.restarts == 0
        actor = made.handles[0].actor
        assert not actor._pending
        assert not actor._refused
        assert not engine.running

    run(main())


def test_a_batch_that_the_engine_died_in_leaves_nothing_behind() -> None:
    async def main() -> None:
        engine = StandInEngine()
        engine.refuse["g2"] = EngineError("vLLM's engine process has died")
        handle = Handle("r", engine)
        await handle.actor.sync(info(0), PROBE)
        answer = await handle.actor.submit([request(f"g{i}") for i in range(4)])
        assert isinstance(answer, Failure)
        assert answer.kind == "infra"
        await asyncio.sleep(0.01)
        assert not handle.actor._pending
        assert not engine.running
        assert sorted(engine.aborted) == ["g0/0", "g0/1", "g1/0", "g1/1"]

    run(main())


@pytest.mark.parametrize("after", [0.0, 0.003])
def test_cancelled_groups_leave_nothing_behind(after: float) -> None:
    async def main() -> None:
        made = Made(StandInEngine(token_s=0.01))
        pool = await made.pool(count=1)
        tasks = await pool.generate([request(f"g{i}") for i in range(4)])
        await asyncio.sleep(after)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.03)
        assert all(task.cancelled() for task in tasks)
        assert not made.handles[0].actor._pending
        assert not made.handles[0].engine.running
        assert pool.fleet.slots[0].load == 0
        assert not pool._dispatcher.queue
        # The pool goes on as before.
        assert isinstance((await outcomes(pool, "later"))[0], GroupMeta)

    run(main())


def test_a_group_that_waits_for_room_can_be_cancelled() -> None:
    async def main() -> None:
        made = Made()
        pool = await made.pool(count=1, max_concurrent=2)
        tasks = await pool.generate([request(f"g{i}") for i in range(3)])
        await asyncio.sleep(0)
        tasks[1].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(got[1], asyncio.CancelledError)
        assert isinstance(got[2][0], GroupMeta)
        assert pool.fleet.slots[0].load == 0

    run(main())


def test_an_actor_that_cannot_be_replaced_ends_every_wait() -> None:
    async def main() -> None:
        engines = [StandInEngine() for _ in range(20)]
        for engine in engines[1:]:
            engine.fail_load[0] = EngineError("boom")
        made = Made(*engines)
        pool = await made.pool(count=1, start_timeout_s=5)
        made.handles[0].kill()
        tasks = await pool.generate([request(f"g{i}") for i in range(3)])
        for got in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(got, RolloutError)
            assert "no rollout actor is left" in str(got)
        with pytest.raises(RolloutError, match="boom"):
            await pool.sync(info(1), PROBING)

    run(main())


def test_time_counts_only_while_nothing_moves() -> None:
    watch = Watch()
    for progress in itertools.chain(range(10), [9, 9]):
        watch.beat(1.0, progress)
    assert watch.silent_s == 2.0
    assert watch.late(0.0, 2.0)
    assert not watch.late(watch.total_s - 1, 2.0), "who came later has waited less"
    watch.beat(1.0)
    assert watch.silent_s == 3.0, "no answer is no progress"
    watch.beat(1.0, 10)
    assert watch.silent_s == 0.0
    watch.beat(1.0, 11, Look((1,), 0.0, stopped=False, awake=False))
    for second in range(1, 11):
        watch.beat(1.0, 11, Look((1,), float(second), stopped=False, awake=True))
    assert watch.silent_s == pytest.approx(10 / BUSY_FACTOR), "it computes"


def test_an_engine_that_stays_at_the_version_before_ends_the_run() -> None:
    """Within every tolerance, but nearer to the old version than to the new one."""

    async def main() -> None:
        pool = await Made().pool(count=1)
        moved = [LEARNER[0] - 0.05, LEARNER[1] + 0.05]
        await pool.sync(info(1), Probe(PROBE, moved, tolerance=0.1))

    with pytest.raises(RolloutError, match="nearer to those of the version before"):
        run(main())
