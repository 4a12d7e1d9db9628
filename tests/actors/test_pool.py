"""RolloutPool against actors that misbehave. The actors are stand-ins; the pool is the real one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from cohort.actors.config import ActorsConfig
from cohort.actors.fleet import MAX_RESTARTS
from cohort.actors.machine import split_cores
from cohort.actors.pool import RolloutPool
from cohort.actors.probe import Probe, probe_gap
from cohort.actors.records import (
    Failure,
    GroupMeta,
    Place,
    Prompt,
    Request,
    SamplingSpec,
    WeightsInfo,
)
from cohort.actors.rollout import RolloutActor
from cohort.actors.slot import RolloutError
from tests.harness import clock

LEARNER = [-1.0, -2.0]
NOTICES: list[str] = []


def probe() -> Probe:
    return Probe([1, 2, 3], LEARNER, tolerance=0.1)


def info(version: int) -> WeightsInfo:
    return WeightsInfo(version, ("w",), "", 1, "/nowhere", "node")


def request(name: str, samples: int = 2) -> Request:
    return Request(name, Prompt(name, (1, 2), "p"), SamplingSpec(4, 1.0, samples, 0))


class Method:
    """Looks like a Ray actor's method: `.remote()` gives something to await."""

    def __init__(self, function: Any, returns: int = 1) -> None:
        self._function = function
        self._returns = returns

    def options(self, num_returns: int) -> Method:
        return Method(self._function, num_returns)

    def remote(self, *arguments: Any) -> Any:
        task = asyncio.ensure_future(self._function(*arguments))
        return (task, f"ref:{arguments[0]}") if self._returns == 2 else task


class FakeActor:
    """A rollout actor without an engine; `plan` says what it does with which group."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.name = name
        self.plan = plan
        self.version = -1
        self.batches: list[list[str]] = []
        self.running = 0
        self.peak = 0
        self.probe = list(LEARNER)
        for method in ("place", "start", "sync", "submit", "completion", "collect", "memory"):
            setattr(self, method, Method(getattr(self, "_" + method)))

    async def _place(self) -> Place:
        return Place("local", (0, 1, 2, 3), 1)

    async def _start(self, cores: tuple[int, ...], _serve_loaded: bool) -> float | Failure:
        self.cores = cores
        return self.plan.get("start", 1.0)

    async def _sync(self, weights: WeightsInfo, _probe: list[int]) -> list[float] | Failure:
        what = self.plan.get(f"v{weights.version}")
        if what == "die":
            raise ActorDiedError()
        if what is not None:
            return what
        self.version = weights.version
        return self.probe

    async def _submit(self, requests: list[Request]) -> Failure | None:
        if self.version < 0:
            return Failure("infra", "refused", "not synced")
        self.batches.append([r.group_id for r in requests])
        self.running += sum(r.sampling.n for r in requests)
        self.peak = max(self.peak, self.running)
        return None

    async def _completion(self, group_id: str, index: int) -> Failure | None:
        await asyncio.sleep(0.001 * index)
        if self.plan.get(group_id) and index:
            return Failure("infra", "lost", "x")
        return None

    async def _collect(self, group_id: str) -> Any:
        what = self.plan.get(group_id)
        await asyncio.sleep(0.01)
        self.running -= 2
        if what == "die":
            raise ActorDiedError()
        if what == "hang":
            await asyncio.sleep(60)
        if isinstance(what, Failure):
            return what
        versions = (self.version, self.version)
        return GroupMeta(group_id, 2, ("a", "b"), (1, 1), (False, False), versions, self.name, 0.1)

    async def _memory(self) -> int:
        return 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeActor]:
    monkeypatch.setattr(ray, "kill", lambda _: None)
    return []


def pool_of(made: list[FakeActor], plans: list[dict[str, Any]], **options: Any) -> RolloutPool:
    count = options.pop("count", 2)

    def make(name: str) -> FakeActor:
        actor = FakeActor(name, plans[len(made)] if len(made) < len(plans) else {})
        made.append(actor)
        return actor

    return RolloutPool(make, ActorsConfig(count=count, **options), NOTICES.append)


async def started(pool: RolloutPool) -> RolloutPool:
    await pool.start(5)
    await pool.sync(info(0), probe())
    return pool


def test_requests_are_dealt_evenly_in_order_and_in_one_call(made: list[FakeActor]) -> None:
    async def main() -> list[Any]:
        pool = await started(pool_of(made, []))
        tasks = await pool.generate([request(f"g{i}") for i in range(6)])
        return [await task for task in tasks]

    outcomes = clock.run(main())
    assert [meta.group_id for meta, _ in outcomes] == [f"g{i}" for i in range(6)]
    assert [ref for _, ref in outcomes] == [f"ref:g{i}" for i in range(6)]
    assert made[0].batches == [["g0", "g2", "g4"]]
    assert made[1].batches == [["g1", "g3", "g5"]]


def test_cores_are_disjoint(made: list[FakeActor]) -> None:
    clock.run(started(pool_of(made, [])))
    assert made[0].cores == (0, 1)
    assert made[1].cores == (2, 3)


def test_an_engine_never_gets_more_than_it_may_work_on(made: list[FakeActor]) -> None:
    async def main() -> int:
        pool = await started(pool_of(made, [], count=1, max_concurrent=4))
        tasks = await pool.generate([request(f"g{i}") for i in range(9)])
        return len([await task for task in tasks])

    assert clock.run(main()) == 9
    assert made[0].peak == 4


@pytest.mark.parametrize("how", ["die", Failure("infra", "broke", "x"), "hang"])
def test_a_lost_group_is_generated_elsewhere_by_a_synced_actor(
    made: list[FakeActor], how: Any
) -> None:
    plan = {"g0": how}

    async def main() -> list[Any]:
        pool = await started(pool_of(made, [plan], group_timeout_s=0.2))
        await pool.sync(info(7), probe())
        tasks = await pool.generate([request(f"g{i}") for i in range(4)])
        outcomes = [await task for task in tasks]
        assert pool.fleet.restarts == 1
        assert "is replaced: " in NOTICES[-1]
        return outcomes

    outcomes = clock.run(main())
    assert [meta.group_id for meta, _ in outcomes] == ["g0", "g1", "g2", "g3"]
    # The new actor was brought to version 7 before it generated anything.
    assert {meta.weight_versions for meta, _ in outcomes} == {(7, 7)}
    assert len(made) == 3


def test_completions_arrive_before_their_group_and_again_after_a_loss(
    made: list[FakeActor],
) -> None:
    arrived: list[tuple[str, int, Any]] = []

    async def main() -> None:
        pool = await started(pool_of(made, [{"g0": "die"}]))
        requests = [request("g0"), request("g1")]
        tasks = await pool.generate(requests, lambda *what: arrived.append(what))
        while len(arrived) < 3:
            await asyncio.sleep(0.0005)
        assert not any(task.done() for task in tasks)
        # One of g0 was there before its actor died.
        assert sorted(arrived) == [("g0", 0, "ref:g0"), *[("g1", 0, "ref:g1")] * 2]
        await asyncio.gather(*tasks)

    clock.run(main())
    assert sorted(arrived)[1:3] == [("g0", 1, "ref:g0")] * 2
    assert len(arrived) == 5


def test_one_death_noticed_by_many_groups_is_one_replacement(made: list[FakeActor]) -> None:
    plan = {f"g{i}": "die" for i in range(0, 8, 2)}

    async def main() -> int:
        pool = await started(pool_of(made, [plan]))
        tasks = await pool.generate([request(f"g{i}") for i in range(8)])
        outcomes = [await task for task in tasks]
        assert all(isinstance(meta, GroupMeta) for meta, _ in outcomes)
        return pool.fleet.restarts

    assert clock.run(main()) == 1


def test_an_actor_that_leaves_gets_no_more_groups(made: list[FakeActor]) -> None:
    async def main() -> None:
        pool = await started(pool_of(made, []))
        begun = await pool.generate([request(f"g{i}") for i in range(4)])
        pool.fleet.scale(1)
        more = await pool.generate([request(f"h{i}") for i in range(4)])
        found = [(await task)[0] for task in (*begun, *more)]
        assert [meta.actor for meta in found[:4]] == ["rollout-0", "rollout-1"] * 2
        assert {meta.actor for meta in found[4:]} == {"rollout-0"}
        await asyncio.sleep(5)
        assert [slot.index for slot in pool.fleet.slots] == [0]
        # Another one takes the free place, and pulls before it generates.
        pool.fleet.scale(2)
        await pool.sync(info(1), probe())
        await asyncio.sleep(1)
        assert [slot.version for slot in pool.fleet.slots] == [1, 1]
        assert made[2].name == "rollout-1"

    clock.run(main())


def test_a_group_that_cannot_be_generated_anywhere_is_not_tried_again(
    made: list[FakeActor],
) -> None:
    bad = Failure("data", "prompt too long", "2000 tokens")

    async def main() -> Any:
        pool = await started(pool_of(made, [{"g0": bad}]))
        [task] = await pool.generate([request("g0")])
        assert pool.fleet.restarts == 0
        return await task

    assert clock.run(main()) == (bad, None)


def test_an_actor_that_keeps_failing_ends_the_run_with_its_last_words(
    made: list[FakeActor],
) -> None:
    """The last one that is left; it is tried for as long as the key says."""
    plans = [{"g0": "die"}, *({"start": Failure("infra", "no", f"boom {k}")} for k in range(99))]

    async def main() -> None:
        pool = await started(pool_of(made, plans, count=1, start_timeout_s=100))
        [task] = await pool.generate([request("g0")])
        await task

    says = r"failed 12 times in a row within 121 s \(actors.start_timeout_s=100 .*boom 10"
    with pytest.raises(RolloutError, match=says):
        clock.run(main())


def test_the_last_actor_may_come_back_as_long_as_the_key_says(made: list[FakeActor]) -> None:
    """Memory that another program needed for a minute, say."""
    broken = [{"start": Failure("infra", "could not start", "no memory")} for _ in range(8)]

    async def main() -> Any:
        pool = await started(pool_of(made, [{"g0": "die"}, *broken], count=1))
        [task] = await pool.generate([request("g0")])
        assert isinstance((await task)[0], GroupMeta)
        return pool.fleet.counts

    assert clock.run(main()) == {"serving": 1, "restarts": 9, "retired": 0}


def test_a_slot_that_keeps_failing_is_retired_and_the_run_goes_on_down_to_one(
    made: list[FakeActor],
) -> None:
    broken = {"start": Failure("infra", "could not start", "no memory")}
    plans = [{}, {"g1": "die"}, {"g2": "die"}, *[broken] * 20]

    async def main() -> RolloutPool:
        pool = await started(pool_of(made, plans, count=3))
        for step in range(1, 4):
            tasks = await pool.generate([request(f"g{i}") for i in range(6)])
            made_now = [(await task)[0] for task in tasks]
            assert all(isinstance(meta, GroupMeta) for meta in made_now)
            await pool.sync(info(step), probe())
        return pool

    pool = clock.run(main())
    assert pool.fleet.counts == {"serving": 1, "restarts": 2 * MAX_RESTARTS, "retired": 2}
    assert [note for note in NOTICES if "retired" in note][-1] == (
        "rollout-1 is retired after 4 failures in a row, and the run goes on with 1 of its actors; "
        "the last time: could not start: no memory"
    )
    assert made[0].version == 3


@pytest.mark.parametrize("how", ["die", Failure("infra", "broke", "its engine died")])
def test_an_actor_lost_during_a_sync_is_replaced(made: list[FakeActor], how: Any) -> None:
    """Also when its replacement is lost in the same way."""

    async def main() -> RolloutPool:
        pool = await started(pool_of(made, [{}, {"v7": how}, {"v7": how}]))
        await pool.sync(info(7), probe())
        await asyncio.sleep(1)
        return pool

    pool = clock.run(main())
    assert pool.fleet.restarts == 2
    assert [actor.version for actor in made] == [7, 0, -1, 7]


def test_a_replacement_that_cannot_start_is_tried_again(made: list[FakeActor]) -> None:
    late = {"start": Failure("infra", "could not start", "memory is still taken")}

    async def main() -> list[Any]:
        pool = await started(pool_of(made, [{"g0": "die"}, late], count=1))
        [task] = await pool.generate([request("g0")])
        return [(await task)[0], pool.fleet.restarts]

    meta, restarts = clock.run(main())
    assert isinstance(meta, GroupMeta)
    assert restarts == 2


def test_weights_that_no_engine_takes_stop_the_run(made: list[FakeActor]) -> None:
    plans = [{"v1": Failure("data", "rollout-0 refused weights", "older")}]

    async def main() -> None:
        pool = await started(pool_of(made, plans, count=1))
        await pool.sync(info(1), probe())

    with pytest.raises(RolloutError, match="refused weights: older"):
        clock.run(main())
    assert len(made) == 1


def test_failures_far_apart_do_not_add_up(made: list[FakeActor]) -> None:
    """A run of weeks loses an actor now and then; only failures in a row end it."""
    plans = [{f"g{i}": "die"} for i in range(0, 20, 2)]

    async def main() -> int:
        pool = await started(pool_of(made, plans, count=1))
        for index in range(2 * (MAX_RESTARTS + 2)):
            [task] = await pool.generate([request(f"g{index}")])
            assert isinstance((await task)[0], GroupMeta)
        return pool.fleet.restarts

    assert clock.run(main()) == MAX_RESTARTS + 2


def test_wrong_weights_stop_the_run(made: list[FakeActor]) -> None:
    async def main() -> None:
        pool = await started(pool_of(made, []))
        made[1].probe = [-1.0, -2.5]
        await pool.sync(info(1), probe())

    with pytest.raises(RolloutError, match=r"rollout-1 does not serve .* 0\.2500 .* version 1"):
        clock.run(main())


def test_nan_in_the_probe_is_not_within_tolerance(made: list[FakeActor]) -> None:
    async def main() -> None:
        pool = await started(pool_of(made, []))
        made[0].probe = [float("nan"), -2.0]
        await pool.sync(info(1), probe())

    with pytest.raises(RolloutError, match="does not serve"):
        clock.run(main())


def test_an_engine_that_cannot_start_says_why(made: list[FakeActor]) -> None:
    plan = {"start": Failure("infra", "rollout-0 could not start its engine", "no such model")}
    with pytest.raises(RolloutError, match="no such model"):
        clock.run(started(pool_of(made, [plan])))


def test_probe_gap_is_the_mean_absolute_difference() -> None:
    assert probe_gap(LEARNER, [-1.5, -1.0]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shorter"):
        probe_gap(LEARNER, [-1.0])


@pytest.mark.parametrize(
    ("cores", "parts", "expected"),
    [
        ((0, 1), 1, [(0, 1)]),
        ((0, 1), 2, [(0,), (1,)]),
        ((4, 5, 6, 7, 8), 2, [(4, 5), (6, 7, 8)]),
        ((0, 1), 3, [(0,), (1,), (0,)]),
    ],
)
def test_split_cores(cores: Any, parts: int, expected: Any) -> None:
    assert split_cores(cores, parts) == expected


def test_an_actor_refuses_to_generate_before_it_has_pulled_weights(tmp_path: Any) -> None:
    actor = RolloutActor("r", spec=None, log_dir=str(tmp_path))  # type: ignore[arg-type]
    answer = clock.run(actor.submit([request("g0")]))
    assert isinstance(answer, Failure)
    assert answer.kind == "infra"
    assert "not pulled weights" in answer.message
