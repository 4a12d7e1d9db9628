"""The reward worker inside real Ray: correct scores, real deadlines, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cohort.actors.records import Completion, Group, Prompt, ScoredGroup, ScoreMeta
from cohort.rewards.config import RewardsConfig, TaskConfig
from cohort.rewards.handle import RewardHandle
from cohort.rewards.pool import RewardPool
from cohort.rewards.specs import RewardSpec, reward_specs
from cohort.rewards.tasks import load_task
from cohort.rewards.watching import watched_worker_class
from cohort.rewards.worker import RewardWorker, longest_score_s

pytestmark = pytest.mark.system

HANG = """
import ctypes, signal, subprocess, sys, time

def hang(completions):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if completions[0][0]["content"] == "hang":
        ctypes.PyDLL(None).sleep(60)
    return [1.0] * len(completions)

def hang_each(completions):
    for completion in completions:
        if completion[0]["content"] == "hang":
            time.sleep(60)
    return [1.0] * len(completions)

def alarm_works(completions):
    def ring(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        return [1.0] * len(completions)
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def hang_file(tmp_path: Path) -> Path:
    file = tmp_path / "hang_reward.py"
    file.write_text(HANG)
    return file


def make_actor(specs: list[RewardSpec], timeout_s: float) -> Any:
    return ray.remote(RewardWorker).options(num_cpus=0).remote(specs, timeout_s)


def make_group(question: str, texts: list[str], **columns: Any) -> Group:
    completions = tuple(
        Completion(f"c{i}", "p", np.arange(2), np.zeros(2, np.float32), "stop", i, (0, 0), text)
        for i, text in enumerate(texts)
    )
    prompt = Prompt("p", (1,), [{"role": "user", "content": question}], columns)
    return Group("g", prompt, completions)


def score(actor: Any, group: Group) -> tuple[ScoreMeta, ScoredGroup]:
    meta, scored = ray.get(actor.score.options(num_returns=2).remote(group), timeout=60)
    assert isinstance(meta, ScoreMeta), meta
    return meta, scored


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ended(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return ended(pid)


def test_known_right_answers_score_through_the_real_actor(hang_file: Path) -> None:
    task = load_task(TaskConfig(), seed=0)
    row = task.train_row(0)
    specs = [
        *reward_specs(task, RewardsConfig()),
        RewardSpec("alarm_works", f"{hang_file}:alarm_works", 0.5),
    ]
    actor = make_actor(specs, 20)
    answer = row.columns["answer"]
    assert isinstance(row.content, list)
    group = make_group(
        row.content[0]["content"], [str(answer), str(answer + 1), "1 2 3"], answer=answer
    )
    meta, scored = score(actor, group)
    assert meta.totals == scored.totals == (1.5, 0.5, 0.5)
    assert meta.by_function["exact_number"] == (1.0, 0.0, 0.0)
    assert "reward worker" in ray.get(actor.ping.remote(), timeout=30)
    ray.kill(actor)


def test_a_hang_is_ended_and_no_process_is_left(hang_file: Path) -> None:
    actor = make_actor([RewardSpec("hang", f"{hang_file}:hang")], 0.5)
    pid, child = ray.get(actor.pids.remote(), timeout=60)
    for _ in range(2):
        started = time.monotonic()
        meta, _scored = score(actor, make_group("Q", ["hang", "a"]))
        assert time.monotonic() - started < 10
        assert [(error.completion_id, error.cause) for error in meta.errors] == [("c0", "timeout")]
        assert meta.totals == (None, 1.0)
        meta, _scored = score(actor, make_group("Q", ["a", "b"]))
        assert meta.totals == (1.0, 1.0)
    assert ended(child)
    assert len(psutil.Process(pid).children()) == 1
    ray.kill(actor)


@pytest.mark.exhaustive
def test_a_hundred_hanging_samples_on_four_workers(hang_file: Path) -> None:
    """Groups of five, all hanging, among groups that do not; every worker lives on."""
    actors = [make_actor([RewardSpec("hang", f"{hang_file}:hang_each")], 0.5) for _ in range(4)]
    pool = RewardPool([RewardHandle(actor) for actor in actors], longest_score_s(0.5, 1, 5))

    async def main() -> list[Any]:
        await pool.check(60)
        groups = [make_group("Q", ["hang"] * 5) for _ in range(20)]
        groups += [make_group("Q", ["a"] * 5) for _ in range(4)]
        return list(await asyncio.gather(*(pool.score(group) for group in groups)))

    before = [ray.get(actor.pids.remote(), timeout=60)[0] for actor in actors]
    started = time.monotonic()
    metas = [meta for meta, _ in asyncio.run(main())]
    # 5 groups a worker, of 0.5 s and five times 0.5 s; the rest is six new children a group.
    assert time.monotonic() - started < 90
    causes = [error.cause for meta in metas[:20] for error in meta.errors]
    assert causes == ["timeout"] * 100
    assert all(meta.totals == (1.0,) * 5 for meta in metas[20:])
    after = [ray.get(actor.pids.remote(), timeout=60) for actor in actors]
    assert [pid for pid, _ in after] == before
    assert all(child is not None and not ended(child) for _, child in after)
    for actor in actors:
        ray.kill(actor)


@pytest.mark.parametrize("busy", [False, True])
def test_no_child_outlives_a_killed_actor(hang_file: Path, busy: bool) -> None:
    actor = make_actor([RewardSpec("hang", f"{hang_file}:hang")], 60)
    pid, child = ray.get(actor.pids.remote(), timeout=60)
    assert not ended(child)
    if busy:
        # Held in C, deaf to SIGTERM, so that only the kernel can end it.
        actor.score.options(num_returns=2).remote(make_group("Q", ["hang"]))
        time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    assert wait_until_ended(child, 5)


def test_a_function_that_cannot_be_loaded_is_named(hang_file: Path) -> None:
    actor = make_actor([RewardSpec("hang", f"{hang_file}:hung")], 5)
    with pytest.raises(ray.exceptions.RayActorError, match=r"no 'hung' in .*did you mean hang\?"):
        ray.get(actor.ping.remote(), timeout=60)


SLEEPY = """
import subprocess, sys, time

def slow(completions):
    time.sleep(float(completions[0][0]["content"]))
    return [1.0] * len(completions)

def leaves_a_daemon(completions):
    code = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(300)"
    subprocess.Popen([sys.executable, "-c", code]).wait()
    return [1.0] * len(completions)
"""


def make_pool(file: Path, function: str, workers: int, timeout_s: float = 20) -> RewardPool:
    """As a run makes it, with less patience."""
    specs = [RewardSpec(function, f"{file}:{function}")]
    actor_class = watched_worker_class(RewardWorker)

    def make() -> RewardHandle:
        return RewardHandle(
            actor_class.options(num_cpus=0, max_restarts=-1).remote(specs, timeout_s)
        )

    return RewardPool(
        [make() for _ in range(workers)],
        longest_score_s(timeout_s, 1, 4) + 30,
        timeout_key=f"rewards.timeout_s={timeout_s:g}",
        pings_while_scoring=True,
        streams=False,
        make_worker=make,
        restart_s=60,
    )


async def pids_of(pool: RewardPool) -> list[tuple[int, int]]:
    return [await worker.handle._actor.pids.remote() for worker in pool._workers]


@pytest.fixture
def sleepy_file(tmp_path: Path) -> Path:
    file = tmp_path / "sleepy_reward.py"
    file.write_text(SLEEPY)
    return file


@pytest.mark.parametrize("busy", [True, False])
def test_a_stopped_actor_is_replaced_and_costs_no_group(sleepy_file: Path, busy: bool) -> None:
    async def main() -> None:
        pool = make_pool(sleepy_file, "slow", 1)
        await pool.check(60)
        ((pid, _),) = await pids_of(pool)
        began = time.monotonic()
        if busy:
            scoring = asyncio.create_task(pool.score(make_group("Q", ["8", "8"])))
            await asyncio.sleep(1)
            os.kill(pid, signal.SIGSTOP)
        else:
            os.kill(pid, signal.SIGSTOP)
            scoring = asyncio.create_task(pool.score(make_group("Q", ["0", "0"])))
        scores, _ = await scoring
        assert isinstance(scores, ScoreMeta), scores
        assert scores.totals == (1.0, 1.0)
        assert pool.restarts == 1
        # Found within 15 s; a new process, and its functions.
        assert time.monotonic() - began < 45
        assert wait_until_ended(pid, 10)
        pool.kill()

    asyncio.run(main())


def test_a_stopped_child_costs_its_call_the_deadline_and_no_score(sleepy_file: Path) -> None:
    async def main() -> None:
        pool = make_pool(sleepy_file, "slow", 1, timeout_s=2)
        await pool.check(60)
        ((pid, child),) = await pids_of(pool)
        scoring = asyncio.create_task(pool.score(make_group("Q", ["0.8", "0"])))
        await asyncio.sleep(0.3)
        os.kill(child, signal.SIGSTOP)
        scores, _ = await scoring
        assert isinstance(scores, ScoreMeta), scores
        assert scores.totals == (1.0, 1.0)
        assert ended(child)
        assert [entry[0] for entry in await pids_of(pool)] == [pid]
        assert pool.restarts == 0
        pool.kill()

    asyncio.run(main())


def test_a_healthy_and_slow_function_is_never_replaced(sleepy_file: Path) -> None:
    async def main() -> None:
        pool = make_pool(sleepy_file, "slow", 1)
        await pool.check(60)
        before = await pids_of(pool)
        scores, _ = await pool.score(make_group("Q", ["12", "0"]))
        assert scores.totals == (1.0, 1.0)
        assert (await pids_of(pool), pool.restarts) == (before, 0)
        pool.kill()

    asyncio.run(main())


def test_killed_actors_cost_no_group(sleepy_file: Path) -> None:
    async def main() -> None:
        pool = make_pool(sleepy_file, "slow", 2)
        await pool.check(60)
        groups = [asyncio.create_task(pool.score(make_group("Q", ["0.2"]))) for _ in range(24)]
        await asyncio.sleep(0.5)
        for pid, _ in await pids_of_any(pool):
            os.kill(pid, signal.SIGKILL)
        found = [(await group)[0] for group in groups]
        assert all(isinstance(meta, ScoreMeta) for meta in found), found
        assert pool.restarts >= 1
        pool.kill()

    asyncio.run(main())


async def pids_of_any(pool: RewardPool) -> list[tuple[int, int]]:
    """Of the first actor; it may be scoring, so it is asked behind its call."""
    return [await pool._workers[0].handle._actor.pids.remote()]


def test_no_daemon_of_a_function_outlives_a_killed_actor(sleepy_file: Path) -> None:
    actor = make_actor([RewardSpec("f", f"{sleepy_file}:leaves_a_daemon")], 20)
    pid, child = ray.get(actor.pids.remote(), timeout=60)
    score(actor, make_group("Q", ["a"]))
    (daemon,) = psutil.Process(child).children(recursive=True)
    assert not ended(daemon.pid)
    os.kill(pid, signal.SIGKILL)
    assert wait_until_ended(daemon.pid, 10)
    assert wait_until_ended(child, 5)
