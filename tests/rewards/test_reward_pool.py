"""RewardPool against Ray in virtual time: deaths, freezes, slowness, lost objects, cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError

from cohort.actors.records import Failure
from cohort.rewards.pool import Lost, RewardPool, RewardPoolError
from cohort.rewards.worker import watched_actor_class
from tests.harness.local_ray import LocalRay
from tests.harness.world import in_cluster

TIMEOUT_S = 100.0


class Judge:
    """A reward actor whose answers say who gave them. seconds: of each call."""

    kind = "judge"
    serial = True

    def __init__(self, seconds: float = 0.1) -> None:
        self._seconds = seconds

    async def judge(self, *parts: Any) -> Any:
        await asyncio.sleep(self._seconds)
        return None, parts

    async def score(self, group: Any, *_: Any) -> Any:
        await asyncio.sleep(self._seconds)
        if group == "bad":
            raise ValueError("not a group")
        return f"scored {group}", "kept"

    def ping(self) -> str:
        return "well"


def make_pool(
    ray: LocalRay, count: int, seconds: float = 0.1, restarts: int = -1, **options: Any
) -> RewardPool:
    actor_class = ray.remote(concurrency_groups={"health": 1})(_watched())

    def make() -> Any:
        return actor_class.options(max_restarts=restarts).remote(seconds)

    notes: list[str] = []
    pool = RewardPool(
        [make() for _ in range(count)],
        TIMEOUT_S,
        timeout_key="rewards.timeout_s=20",
        pings_while_judging=True,
        notify=notes.append,
        **{"make_actor": make, **options},
    )
    pool.notes = notes  # type: ignore[attr-defined]
    return pool


def _watched() -> type:
    # `watched_actor_class`, without Ray's own decorator around it.
    class Watched(Judge):
        def ping(self) -> str:
            return super().ping()

        ping.__ray_concurrency_group__ = "health"  # type: ignore[attr-defined]

    return Watched


async def scores(pool: RewardPool, count: int) -> list[Any]:
    found = await asyncio.gather(*(pool.score(f"g{i}") for i in range(count)))
    return [answer for answer, _ in found]


def all_scored(found: list[Any]) -> bool:
    return found == [f"scored g{i}" for i in range(len(found))]


DEATHS = [ActorDiedError(), OutOfMemoryError("killed by Ray's memory monitor")]


@pytest.mark.parametrize("error", DEATHS, ids=["died", "memory"])
@pytest.mark.parametrize("restarts", [0, -1])
def test_a_dead_actor_is_no_black_hole(error: Any, restarts: int) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 2, restarts=restarts)
        await pool.check(10)
        groups = asyncio.create_task(scores(pool, 32))
        await asyncio.sleep(0.05)
        ray.kill("judge-0", error)
        assert all_scored(await groups)
        assert pool.restarts >= 1
        assert "reward actor 0 is replaced" in pool.notes[0]  # type: ignore[attr-defined]
        # Back in the queue: both are idle again.
        await asyncio.sleep(10)
        assert len(pool._idle) == 2

    in_cluster(main)


def test_the_death_of_an_idle_actor_costs_no_attempt() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 4)
        await pool.check(10)
        for name in ("judge-0", "judge-1", "judge-2"):
            ray.kill(name)
        assert all_scored(await scores(pool, 1))

    in_cluster(main)


@pytest.mark.parametrize("busy", [True, False])
def test_a_frozen_actor_is_replaced_by_its_silence(busy: bool) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, frozen_s=30)
        await pool.check(10)
        began = asyncio.get_running_loop().time()
        groups = asyncio.create_task(scores(pool, 3))
        if busy:
            await asyncio.sleep(0.05)
        ray.freeze("judge-0")
        assert all_scored(await groups)
        assert asyncio.get_running_loop().time() - began < 50
        assert pool.restarts == 1

    in_cluster(main)


def test_a_slow_actor_is_left_alone_until_its_deadline() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=TIMEOUT_S - 1, frozen_s=30)
        await pool.check(10)
        assert all_scored(await scores(pool, 2))
        assert pool.restarts == 0

    in_cluster(main)


def test_a_call_beyond_its_deadline_names_the_key_and_its_value() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, seconds=2 * TIMEOUT_S, frozen_s=30)
        await pool.check(10)
        ((answer, _),) = await asyncio.gather(pool.score("g0"))
        assert isinstance(answer, Failure)
        assert answer.kind == "infra"
        assert "100 s" in answer.message
        assert "rewards.timeout_s=20" in answer.message

    in_cluster(main)


def test_no_actor_left_says_what_to_do() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 2, restarts=0, make_actor=None)
        await pool.check(10)
        ray.kill("judge-0")
        ray.kill("judge-1")
        with pytest.raises(RewardPoolError, match=r"no reward actor is left: .*rewards\.workers"):
            await pool.score("g0")

    in_cluster(main)


def test_an_actor_that_is_given_up_is_ended() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1)
        await pool.check(10)
        ray.hooks.append(lambda e: ray.kill(e.actor) if e.what == "ping" else None)
        with pytest.raises(RewardPoolError, match="reward actor 0 was given up: ActorDiedError"):
            await pool.score("g0")
        assert pool.restarts == 3
        ray.hooks.clear()
        await asyncio.sleep(60)
        assert all(actor.death is not None for actor in ray.actors)

    in_cluster(main)


def test_what_the_actor_refuses_fails_once_and_costs_no_actor() -> None:
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


def test_a_lost_group_is_told_from_lost_verdicts() -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1)
        await pool.check(10)
        group, said = ray.put("g0"), ray.put("said")
        said.lose()
        # The group is there: it is judged anew.
        assert (await pool.score(group, [said]))[0] == "scored g0"
        group.lose()
        answer, _ = await pool.score(group)
        assert isinstance(answer, Lost)
        assert answer.kind == "infra"
        assert pool.restarts == 0
        assert ObjectLostError.__name__ in answer.message

    in_cluster(main)


@pytest.mark.parametrize("after_s", [None, 0.0, 0.05, 0.3])
def test_judging_that_is_cancelled_leaves_nothing(after_s: float | None) -> None:
    async def main(ray: LocalRay) -> None:
        pool = make_pool(ray, 1, streams=True)
        await pool.check(10)
        busy = asyncio.create_task(pool.score("g0"))
        if after_s is not None:
            await asyncio.sleep(0)
        judging = [pool.judge("g1 attempt 0", ray.put(i)) for i in range(3)]
        if after_s is not None:
            await asyncio.sleep(after_s)
        for task in judging:
            task.cancel()
        await asyncio.gather(busy, *judging, return_exceptions=True)
        await asyncio.sleep(1)
        assert not pool._waiting
        assert len(pool._idle) == 1
        # The next attempt does not join what was cancelled.
        assert await pool.judge("g1 attempt 0", ray.put(7)) is not None

    in_cluster(main)


def test_a_call_in_progress_that_is_cancelled_keeps_its_actor_busy() -> None:
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


def test_an_actor_that_cannot_start_is_told_in_its_own_words() -> None:
    class Broken(Judge):
        def __init__(self) -> None:
            raise ValueError("no 'hung' in rewards.py")

    async def main(ray: LocalRay) -> None:
        pool = RewardPool([ray.remote(Broken).remote()], TIMEOUT_S)
        with pytest.raises(RewardPoolError, match=r"no 'hung' in rewards\.py"):
            await pool.check(10)

    in_cluster(main)


def test_watching_a_class_does_not_change_it() -> None:
    before: Callable[..., Any] = Judge.ping
    watched_actor_class(Judge)
    assert Judge.ping is before
    assert not hasattr(Judge.ping, "__ray_concurrency_group__")
