"""Starts what a command needs in other processes, and ends it: Ray, engines, rewards, learner.

`launch` is the one place where actors are started and ended: for training, evaluation, warm-up, the
check and the Python API alike.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cohort.actors.engine import EngineSpec
from cohort.actors.machine import usable_cores
from cohort.actors.pool import RolloutPool
from cohort.actors.process import SHM
from cohort.actors.rollout import RolloutActor
from cohort.cluster.config import Config
from cohort.cluster.cores import CoreShares, share_cores
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import (
    Placement,
    Resources,
    bfloat16_on_this_cpu,
    connected_cluster,
    cpu_environment,
    plan,
    this_machine,
)
from cohort.cluster.prepare import Prepared
from cohort.cluster.ray_start import connect, ray_address
from cohort.cluster.ray_watch import Server, ray_servers, unless_ray_dies
from cohort.cluster.signals import Signals
from cohort.learner.learner import Learner
from cohort.learner.spec import LearnerSpec
from cohort.rewards.environments.handle import EnvironmentHandle, EnvironmentPool
from cohort.rewards.environments.worker import EnvironmentWorker
from cohort.rewards.handle import RewardHandle
from cohort.rewards.pool import RewardPool
from cohort.rewards.watching import watched_worker_class
from cohort.rewards.worker import RewardWorker, longest_score_s

if TYPE_CHECKING:
    from ray.actor import ActorProxy

Part = Literal["engines", "rewards", "learner"]
PARTS: tuple[Part, ...] = ("engines", "learner", "rewards")
# How often our signal handlers are set again while Ray sets its own.
HANDLERS_S = 0.05


@dataclass
class Services:
    """The parts of a run in other processes. A part that was not asked for is not there.

    Attributes:
        pool: The rollout actors with their engines.
        rewards: The reward workers.
        learner: The ranks.
        environments: Their workers; None where the task has no environment.
        servers: Ray's own, which all of these need.
    """

    placement: Placement
    pool: RolloutPool = field(init=False)
    rewards: RewardPool = field(init=False)
    learner: Learner = field(init=False)
    environments: EnvironmentPool | None = None
    engine_start_s: float = 0.0
    servers: dict[str, Server] = field(default_factory=dict)
    started: list[RolloutPool | EnvironmentPool | RewardPool | Learner] = field(
        default_factory=list
    )

    def kill(self) -> None:
        """End every actor, whatever state the run is in; their watchers clean up after them."""
        for part in self.started:
            part.kill()


@asynccontextmanager
async def launch(
    prepared: Prepared,
    console: Console,
    log_dir: Path,
    parts: Sequence[Part] = PARTS,
    *,
    signals: Signals | None = None,
    trial: Path | None = None,
    learner_threads: int | None = None,
) -> AsyncIterator[Services]:
    """Start Ray and actors side by side; end them when the block is left, however it is left.

    Args:
        log_dir: where each actor writes its log.
        parts: what to start. Engines without a learner serve the model folder's weights; with one
            they wait for its first publication.
        signals: the command's handlers, which Ray's start would replace.
        trial: where the learner tries to save before the first step; None: nothing will be saved.
        learner_threads: of each rank; None: the machine's cores, divided by the ranks.

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
        services = Services(plan(config, have, prepared.parameters, prepared.trained))
        slow = config.model.precision == "bfloat16" and not bfloat16_on_this_cpu()
        if slow and services.placement.device == "cpu":
            console.note(
                "model.dtype=bfloat16: this CPU has no bfloat16 arithmetic, and trains more than "
                "ten times faster with model.dtype=float32"
            )
        console.stage(f"starting {', '.join(_counted(config, part) for part in parts)}")
        services.servers = ray_servers(joined or ray_address(config) is not None)
        await unless_ray_dies(
            _start(services, prepared, console, log_dir, parts, trial, learner_threads),
            services.servers,
        )
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
    learner_threads: int | None,
) -> None:
    import ray

    placement, timeout_s = services.placement, prepared.config.cluster.start_timeout_s
    starting: list[Coroutine[object, object, None]] = []

    cores = usable_cores()
    one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
    shares = CoreShares()
    if "engines" in parts and "learner" in parts:
        shares = share_cores(prepared.config, placement.device, cores, one_machine)
    free = len(shares.learner or cores)
    threads = learner_threads or max(1, free // prepared.config.learner.workers)
    if shares.own:
        console.note(
            f"cores: {len(shares.engines)} for engines, {len(shares.learner)} for the learner "
            "(cluster.cores)"
        )

    async def start_the_learner() -> None:
        services.learner = await start_learner(
            prepared, placement, log_dir, threads, shares.learner, trial, console.note
        )
        services.started.append(services.learner)

    async def start_engines() -> None:
        seconds = await services.pool.start(timeout_s, serve_loaded="learner" not in parts)
        services.engine_start_s = max(seconds)
        console.note(f"engine(s) started in {services.engine_start_s:.1f} s")

    services.environments = make_environments(prepared, placement)
    if services.environments is not None:
        services.started.append(services.environments)
        starting.append(services.environments.check(timeout_s))
    if "engines" in parts:
        services.pool = make_pool(
            prepared, placement, log_dir, console, services.environments, shares.engines
        )
        services.started.append(services.pool)
    if "rewards" in parts:
        services.rewards = make_rewards(prepared, placement, console)
        services.started.append(services.rewards)
        starting.append(services.rewards.check(timeout_s))
    if "learner" in parts:
        starting.append(start_the_learner())
    if "engines" in parts:
        starting.append(start_engines())
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
        # A Ray that has half started cannot be shut down.
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


def make_environments(prepared: Prepared, placement: Placement) -> EnvironmentPool | None:
    """The workers of environments; Ray starts one again when it dies. None: there is none."""
    import ray

    config, spec = prepared.config.environments, prepared.environment()
    if spec is None:
        return None
    return EnvironmentPool(
        [
            EnvironmentHandle(
                ray.remote(EnvironmentWorker)
                .options(max_concurrency=10_000, max_restarts=-1, **placement.reward)
                .remote(spec),
                config.step_timeout_s,
            )
            for _ in range(config.workers)
        ]
    )


def make_pool(
    prepared: Prepared,
    placement: Placement,
    log_dir: Path,
    console: Console,
    environments: EnvironmentPool | None = None,
    cores: tuple[int, ...] = (),
) -> RolloutPool:
    """The rollout actors, not started yet.

    Args:
        prepared: Config, model and prompts.
        placement: Where the actors go.
        log_dir: For the logs of their processes.
        console: Shows what happens to actors.
        environments: The workers of environments; None: the task has no environment.
        cores: Of their engines; empty: all.
    """
    import ray

    config = prepared.config
    spec = EngineSpec(
        model_path=prepared.model_path,
        dtype=config.model.precision,
        device=placement.device,
        max_length=prepared.lengths.max_length,
        actors=config.actors,
        seed=config.run.seed,
    )

    def make_actor(name: str) -> ActorProxy[RolloutActor]:
        return (
            ray.remote(RolloutActor)
            .options(max_concurrency=10_000, **placement.rollout)
            .remote(name, spec, str(log_dir))
        )

    next_host = None if environments is None else environments.next
    return RolloutPool(make_actor, config.actors, console.note, next_host, cores)


def make_rewards(prepared: Prepared, placement: Placement, console: Console) -> RewardPool:
    """The reward workers; Ray starts one again when it dies, for it holds no state."""
    config = prepared.config.rewards
    worker_class = watched_worker_class(RewardWorker)

    def make_worker() -> RewardHandle:
        actor = worker_class.options(max_restarts=-1, **placement.reward).remote(
            prepared.rewards,
            config.timeout_s,
            memory_bytes=config.memory_bytes,
            max_steps=prepared.config.run.steps,
        )
        return RewardHandle(actor)

    group_size = prepared.config.task.group_size
    bound = longest_score_s(config.timeout_s, len(prepared.rewards), group_size)
    return RewardPool(
        [make_worker() for _ in range(config.workers)],
        timeout_s=bound + 30,
        timeout_key=f"rewards.timeout_s={config.timeout_s:g}",
        pings_while_scoring=True,
        streams=any(spec.whole_group is False for spec in prepared.rewards),
        make_worker=make_worker,
        notify=console.note,
    )


async def start_learner(
    prepared: Prepared,
    placement: Placement,
    log_dir: Path,
    threads: int,
    cores: tuple[int, ...] = (),
    trial: Path | None = None,
    notify: Callable[[str], None] = print,
) -> Learner:
    """The learner's ranks, ready to train from the model folder.

    Args:
        prepared: Config and model.
        placement: Where the ranks go.
        log_dir: For the logs of their processes.
        threads: Of each rank.
        cores: That the ranks are bound to; empty: to none.
        trial: Where they try to save first (see `Checkpoints.trial`); None: nothing will be saved.
        notify: Called with a line when ranks are lost and started again.
    """
    config = prepared.config
    ranks = config.learner.workers
    spec = LearnerSpec(
        model_path=prepared.model_path,
        dtype=config.model.precision,
        learner=config.learner,
        algorithm=config.algorithm,
        temperature=config.actors.temperature,
        max_tokens=config.completion_tokens,
        # The other ranks differ in their number only.
        rank=0,
        world_size=ranks,
        device=placement.device,
        threads=threads,
        seed=config.run.seed,
        shm_dir=f"{SHM}/cohort-learner-{os.getpid()}-{uuid.uuid4().hex[:12]}",
        log_dir=str(log_dir),
        total_steps=config.run.steps,
        trial_dir=None if trial is None else str(trial),
        cores=cores,
        init_from=None if prepared.init_from is None else str(prepared.init_from),
        lora=config.model.lora,
    )
    environment = cpu_environment(threads) if placement.device == "cpu" else {}
    options = [
        {**placement.learner, "runtime_env": {"env_vars": environment}} for _ in range(ranks)
    ]
    return await Learner.start(spec, options, config.cluster.start_timeout_s, notify)
