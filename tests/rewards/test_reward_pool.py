"""RewardPool against Ray in virtual time: deaths, freezes, slowness, lost objects, cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError

from cohort.actors.records import Failure, Place
from cohort.rewards.handle import RewardHandle
from cohort.rewards.pool import Lost, RewardPool, RewardPoolError
from cohort.rewards.watching import watched_worker_class
from tests.harness.local_ray import NODE, LocalRay, current_actor, current_ray
from tests.harness.world import in_cluster

TIMEOUT_S = 100.0


class Worker:
    """A stand-in for a reward worker. seconds: of each call. deaf: it answers no ping meanwhile."""

    kind = "reward"
    serial = True

    def __init__(self, seconds: float = 0.1, deaf: bool = False) -> None:
        self._seconds = seconds
        self._deaf = deaf
        self._free = asyncio.Event()
        self._free.set()

    async def score_part(self, *parts: Any) -> Any:
        await asyncio.sleep(self._seconds)
        return None, parts

    async def score(self, group: Any, *_: Any) -> Any:
        self._free.clear()
        await asyncio.sleep(self._seconds)
        self._free.set()
        if group == "bad":
            raise ValueError("not a group")
        return f"scored {group}", "kept"

    async def ping(self) -> str:
        if self._deaf:
            await self._free.wait()
        return "well"

    def place(self) -> Place:
        return Place(NODE, (), current_ray().pid_of(current_actor()))


def make_pool(
    ray: LocalRay,
    count: int,
    seconds: float = 0.1,
    restarts: int = -1,
    deaf: bool = False,
    **options: Any,
) -> RewardPool:
    worker_class = ray.remote(concurrency_groups={"health": 1})(_watched())

    def make() -> RewardHandle:
        return RewardHandle(worker_class.options(max_restarts=restarts).remote(seconds, deaf))

    notes: list[str] = []
    pool = RewardPool(
        [make() for _ in range(count)],
        TIMEOUT_S,
        timeout_key="rewards.timeout_s=20",
        pings_while_scoring=True,
        notify=notes.append,
        **{"make_worker": make, **options},
    )
    pool.notes = notes  # type: ignore[attr-defined]
    return pool


def _watched() -> type:
    # `watched_worker_class`, without Ray's own decorator around it.
    class Watched(Worker):
        async def ping(self) -> str:
            return await super().ping()

        def place(self) -> Place:
            return super().place()

        ping.__ray_concurrency_group__ = "health"  # type: ignore[attr-defined]
        place.__ray_concurrency_group__ = "health"  # type: ignore[attr-defined]

    return Watched


async def scores(pool: RewardPool, count: int) -> list[Any]:
    found = await asyncio.gather(*(pool.score(f"g{i}") for i in range(count)))
    return [answer for answer, _ in found]


def all_scored(found: list[Any]) -> bool:
    return found == [f"scored g{i}" for i in range(len(found))]


DEATHS = [ActorDiedError(), OutOfMemoryError("killed by Ray's memory monitor")]


@pytest.mark.parametrize("error", DEATHS, ids=["died", "memory"])
@pytest.mark.parametrize("restarts", [0, -1])
def test_a_worker_that_dies_is_replaced_and_its_group_scored(error: Any, restarts: int) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 2, restarts=restarts)
        await pool.check(10)
        groups = asyncio.create_task(scores(pool, 32))
        await asyncio.sleep(0.05)
        ray.kill("reward-0", error)
        assert all_scored(await groups)
        assert pool.restarts >= 1
        assert "reward worker 0 is replaced" in pool.notes[0]  # type: ignore[attr-defined]
        # Back in the queue: both are idle again.
        await asyncio.sleep(10)
        assert len(pool._idle) == 2

    in_cluster(main)


def test_the_death_of_an_idle_worker_costs_no_attempt() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 4)
        await pool.check(10)
        for name in ("reward-0", "reward-1", "reward-2"):
            ray.kill(name)
        assert all_scored(await scores(pool, 1))

    in_cluster(main)


@pytest.mark.parametrize("busy", [True, False])
def test_a_frozen_worker_is_replaced(busy: bool) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, unseen_s=30)
        await pool.check(10)
        began = asyncio.get_running_loop().time()
        groups = asyncio.create_task(scores(pool, 3))
        if busy:
            await asyncio.sleep(0.05)
        ray.freeze("reward-0")
        assert all_scored(await groups)
        # 15 s to find it, two to start another.
        assert asyncio.get_running_loop().time() - began < 18
        assert pool.restarts == 1

    in_cluster(main)


def test_a_slow_worker_is_not_replaced_before_its_deadline() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=TIMEOUT_S - 1, unseen_s=30)
        await pool.check(10)
        assert all_scored(await scores(pool, 2))
        assert pool.restarts == 0

    in_cluster(main)


def test_a_worker_that_computes_and_cannot_answer_is_left_alone() -> None:
    """Native code that holds the GIL, say; the deadline of its call is another matter."""

    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=80, deaf=True, unseen_s=30)
        await pool.check(10)
        assert all_scored(await scores(pool, 2))
        assert pool.restarts == 0

    in_cluster(main)


def test_workers_join_and_leave_and_no_call_is_lost() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 2, seconds=5)
        await pool.check(10)
        groups = asyncio.create_task(scores(pool, 40))
        await asyncio.sleep(7)
        await pool.scale(4)
        assert pool.count == 4
        await asyncio.sleep(10)
        assert len(ray.living("reward")) == 4
        await pool.scale(1)
        assert pool.count == 1
        # They end their calls first.
        assert len(ray.living("reward")) == 4
        await asyncio.sleep(6)
        assert ray.living("reward") == ["reward-0"]
        assert all_scored(await groups)
        assert pool.restarts == 0
        scored = [event for event in ray.events if event.kind == "done" and event.what == "score"]
        assert len(scored) == 40
        await pool.scale(2)
        await asyncio.sleep(6)
        await pool.scale(1)
        assert len(ray.living("reward")) == 1

    in_cluster(main)


def test_a_call_beyond_its_deadline_names_the_key_and_its_value() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=2 * TIMEOUT_S, unseen_s=30)
        await pool.check(10)
        ((answer, _),) = await asyncio.gather(pool.score("g0"))
        assert isinstance(answer, Failure)
        assert answer.kind == "infra"
        assert "100 s" in answer.message
        assert "rewards.timeout_s=20" in answer.message

    in_cluster(main)


def test_without_a_worker_the_error_says_what_to_do() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 2, restarts=0, make_worker=None)
        await pool.check(10)
        ray.kill("reward-0")
        ray.kill("reward-1")
        with pytest.raises(RewardPoolError, match=r"no reward worker is left: .*rewards\.workers"):
            await pool.score("g0")

    in_cluster(main)


def test_a_worker_that_is_given_up_is_ended() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1)
        await pool.check(10)
        ray.hooks.append(lambda e: ray.kill(e.actor) if e.what == "ping" else None)
        with pytest.raises(RewardPoolError, match="reward worker 0 was given up: ActorDiedError"):
            await pool.score("g0")
        assert pool.restarts == 3
        ray.hooks.clear()
        await asyncio.sleep(60)
        assert all(actor.death is not None for actor in ray.actors)

    in_cluster(main)


def test_a_group_that_a_worker_refuses_is_tried_once() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1)
        await pool.check(10)
        answer, _ = await pool.score("bad")
        assert (answer.kind, pool.restarts) == ("data", 0)
        assert "not a group" in answer.message
        calls = [e for e in ray.events if e.kind == "call" and e.what == "score"]
        assert len(calls) == 1
        assert all_scored(await scores(pool, 2))

    in_cluster(main)


def test_lost_scores_of_a_part_do_not_lose_the_group() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1)
        await pool.check(10)
        group, part = ray.put("g0"), ray.put("part")
        part.lose()
        # The group is there: it is scored again.
        assert (await pool.score(group, [part]))[0] == "scored g0"
        group.lose()
        answer, _ = await pool.score(group)
        assert isinstance(answer, Lost)
        assert answer.kind == "infra"
        assert pool.restarts == 0
        assert ObjectLostError.__name__ in answer.message

    in_cluster(main)


@pytest.mark.parametrize("after_s", [None, 0.0, 0.05, 0.3])
def test_scoring_that_is_cancelled_leaves_nothing(after_s: float | None) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, streams=True)
        await pool.check(10)
        busy = asyncio.create_task(pool.score("g0"))
        if after_s is not None:
            await asyncio.sleep(0)
        scoring = [pool.score_part("g1 attempt 0", ray.put(i)) for i in range(3)]
        if after_s is not None:
            await asyncio.sleep(after_s)
        for task in scoring:
            task.cancel()
        await asyncio.gather(busy, *scoring, return_exceptions=True)
        await asyncio.sleep(1)
        assert not pool._waiting
        assert len(pool._idle) == 1
        # The next attempt does not join what was cancelled.
        assert await pool.score_part("g1 attempt 0", ray.put(7)) is not None

    in_cluster(main)


def test_a_cancelled_call_keeps_its_worker_busy() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=5)
        await pool.check(10)
        first = asyncio.create_task(pool.score("g0"))
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.sleep(0.1)
        assert not pool._idle
        assert all_scored(await scores(pool, 1))

    in_cluster(main)


def test_a_worker_that_cannot_start_is_reported_with_its_error() -> None:
    class Broken(Worker):
        def __init__(self) -> None:
            raise ValueError("no 'hung' in rewards.py")

    async def main(ray: LocalRay) -> None:
        pool = RewardPool([RewardHandle(ray.remote(Broken).remote())], TIMEOUT_S)
        with pytest.raises(RewardPoolError, match=r"no 'hung' in rewards\.py"):
            await pool.check(10)

    in_cluster(main)


def test_watching_a_class_does_not_change_it() -> None:
    before: Callable[..., Any] = Worker.ping
    watched_worker_class(Worker)
    assert Worker.ping is before
    assert not hasattr(Worker.ping, "__ray_concurrency_group__")
