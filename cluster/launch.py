"""Starts what a command needs in other processes, and ends it: Ray, engines, rewards, learner.

`launch` is the one place where actors are started and ended: for training, evaluation, warm-up, the
check and the Python API alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from cohort.actors.pool import RolloutPool
from cohort.cluster.config import Config
from cohort.cluster.making import make_environments, make_pool, make_rewards, start_learner
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import Placement, Resources, connected_cluster, plan, this_machine
from cohort.cluster.prepare import Prepared
from cohort.cluster.ray_start import connect
from cohort.cluster.signals import Signals
from cohort.learner.learner import Learner
from cohort.rewards.environments.handle import EnvironmentPool
from cohort.rewards.pool import RewardPool

Part = Literal["engines", "rewards", "learner"]
PARTS: tuple[Part, ...] = ("engines", "learner", "rewards")
# How often our signal handlers are set again while Ray sets its own.
HANDLERS_S = 0.05
T = TypeVar("T")


@dataclass
class Services:
    """What of a run lives in other processes. A part that was not asked for must not be read."""

    placement: Placement
    engine_start_s: float = 0.0
    _environments: EnvironmentPool | None = None
    _pool: RolloutPool | None = None
    _rewards: RewardPool | None = None
    _learner: Learner | None = None

    @property
    def pool(self) -> RolloutPool:
        """The rollout actors with their engines."""
        return _started(self._pool)

    @property
    def rewards(self) -> RewardPool:
        """The reward workers."""
        return _started(self._rewards)

    @property
    def learner(self) -> Learner:
        """The learner's ranks."""
        return _started(self._learner)

    def kill(self) -> None:
        """End every actor, whatever state the run is in; their watchers clean up after them."""
        for part in (self._pool, self._environments, self._rewards, self._learner):
            if part is not None:
                part.kill()


def _started(part: T | None) -> T:
    assert part is not None, "this part was not launched"
    return part


@asynccontextmanager
async def launch(
    prepared: Prepared,
    console: Console,
    log_dir: Path,
    parts: Sequence[Part] = PARTS,
    *,
    signals: Signals | None = None,
    trial: Path | None = None,
) -> AsyncIterator[Services]:
    """Start Ray and actors side by side; end them when the block is left, however it is left.

    Args:
        log_dir: where each actor writes its log.
        parts: what to start. Engines without a learner serve the model folder's weights; with one
            they wait for its first publication.
        signals: the command's handlers, which Ray's start would replace.
        trial: where the learner tries to save before the first step; None: nothing will be saved.

    Raises:
        CohortError: Ray, a machine or an actor is not fit for this run.
    """
    import ray

    config, joined = prepared.config, ray.is_initialized()
    services: Services | None = None
    try:
        if joined:
            have = connected_cluster()
        else:
            console.stage("starting Ray")
            have = await _connect(config, signals)
        services = Services(plan(config, have, prepared.parameters))
        console.stage(f"starting {', '.join(_counted(config, part) for part in parts)}")
        await _start(services, prepared, console, log_dir, parts, trial)
        yield services
    finally:
        try:
            if services is not None:
                services.kill()
            if not joined:
                ray.shutdown()
        except Exception as error:  # noqa: BLE001 - how the work ended is known already
            console.note(f"not every actor could be ended: {type(error).__name__}: {error}")


def _counted(config: Config, part: Part) -> str:
    return {
        "engines": f"{config.actors.count} engine(s)",
        "rewards": f"{config.rewards.workers} reward worker(s)",
        "learner": f"{config.learner.workers} learner rank(s)",
    }[part]


async def _start(
    services: Services,
    prepared: Prepared,
    console: Console,
    log_dir: Path,
    parts: Sequence[Part],
    trial: Path | None,
) -> None:
    placement, timeout_s = services.placement, prepared.config.cluster.start_timeout_s
    starting: list[Coroutine[object, object, None]] = []

    async def start_the_learner() -> None:
        cores = int(this_machine().cpus)
        services._learner = await start_learner(prepared, placement, log_dir, cores, trial)

    async def start_engines(pool: RolloutPool) -> None:
        seconds = await pool.start(timeout_s, serve_loaded="learner" not in parts)
        services.engine_start_s = max(seconds)
        console.note(f"engine(s) started in {services.engine_start_s:.1f} s")

    if "engines" in parts:
        services._environments = make_environments(prepared, placement)
        services._pool = make_pool(prepared, placement, log_dir, console, services._environments)
    if "rewards" in parts:
        services._rewards = make_rewards(prepared, placement, console)
    if "learner" in parts:
        starting.append(start_the_learner())
    if services._environments is not None:
        starting.append(services._environments.check(timeout_s))
    if services._pool is not None:
        starting.append(start_engines(services._pool))
    if services._rewards is not None:
        starting.append(services._rewards.check(timeout_s))
    await _together(starting)


async def _connect(config: Config, signals: Signals | None) -> Resources:
    """`connect` in a thread: it takes seconds, in which a signal must be heard.

    Ray sets handlers of its own meanwhile, which print native stacks and exit with 15; ours are set
    again until it is done.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    connecting = asyncio.ensure_future(asyncio.to_thread(connect, config, this_machine()))
    try:
        while not connecting.done():
            await asyncio.wait({connecting}, timeout=HANDLERS_S)
            if signals is not None:
                signals.install()
    except asyncio.CancelledError:
        # Half of a Ray cannot be shut down.
        await asyncio.wait({connecting})
        if signals is not None:
            signals.install()
        raise
    return connecting.result()


async def _together(work: Collection[Coroutine[object, object, None]]) -> None:
    """Await all of it; on the first error end the rest, and raise that error."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen; the first one is raised
