"""From a prepared config to a running job and an exit code: start, train, leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import uuid
from pathlib import Path
from typing import Any

from actors.engine import EngineSpec
from actors.pool import RolloutError, RolloutPool
from actors.rollout import RolloutActor
from cluster.config import Config, ConfigError, compact, dump_config, expand
from cluster.console import Console
from cluster.loop import Run, TrainingError, train
from cluster.metrics import Counters
from cluster.placement import (
    Placement,
    PlacementError,
    Resources,
    checkpoint_bytes,
    connected_cluster,
    cpu_environment,
    object_store_bytes,
    plan,
    this_machine,
)
from cluster.prepare import Prepared, RunError, claim_run_dir, first_probe, prepare
from cluster.scribe import Scribe
from cluster.stream import GroupStream
from cluster.tracking import Tracker, write_atomically
from learner.checkpoint import CheckpointError, Checkpoints, latest, load_state
from learner.group import LearnerError, LearnerGroup
from learner.spec import LearnerSpec
from rewards.pool import RewardPool
from rewards.rates import PassRates, RateHistory
from rewards.tasks import Curriculum, Taken, TaskError, take_prompts
from rewards.worker import RewardActor, longest_score_s

CONNECT_TIMEOUT_S = 10
# Engine and learner use different kernels: the gap is about 0.1 in bfloat16, an eighth of that in
# float16, below 1e-4 in float32.
PROBE_TOLERANCE = {"bfloat16": 0.5, "float16": 0.1, "float32": 0.01}
FLOAT8_PROBE_TOLERANCE = 1.0
# What is derived from the first update's gap is no less than this share of them.
PROBE_FLOOR = 0.1


EXPECTED_ERRORS = (
    CheckpointError,
    ConfigError,
    LearnerError,
    PlacementError,
    RolloutError,
    RunError,
    TaskError,
    TrainingError,
)
"""Errors whose message is meant for people: shown without a traceback."""


def ray_address(config: Config) -> str | None:
    """The cluster to join; None for a Ray of our own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def check_reachable(address: str) -> None:
    """Raise RunError when nobody answers at host:port; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise RunError(f"cluster.address={address}: cannot connect to Ray: {error}") from error


def connect(config: Config) -> Resources:
    """Join the Ray cluster, or start a Ray of our own on this machine; what it offers."""
    import ray

    address = ray_address(config)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    # Ray reports how it is used to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise RunError(f"cluster.address={address}: cannot connect to Ray: {error}") from error
        return connected_cluster()
    have = this_machine()
    ray.init(
        num_cpus=int(have.cpus),
        include_dashboard=False,
        object_store_memory=object_store_bytes(have),
        **options,
    )
    return have


def engine_spec(prepared: Prepared, placement: Placement) -> EngineSpec:
    """The engine that every rollout actor of this run builds."""
    config = prepared.config
    return EngineSpec(
        model_path=prepared.model_path,
        dtype=config.model.dtype,
        device=placement.device,
        max_length=prepared.max_length,
        max_concurrent=config.actors.max_concurrent,
        kv_cache_gib=config.actors.kv_cache_gib,
        gpu_memory=config.actors.gpu_memory,
        tensor_parallel=config.actors.tensor_parallel,
        compile=config.actors.compile,
        quantization=config.actors.quantization,
        seed=config.run.seed,
    )


def probe_tolerance(config: Config) -> float:
    """How far engine and learner may be apart on the probe sequence, nats a token."""
    if config.actors.probe_tolerance is not None:
        return config.actors.probe_tolerance
    if config.actors.quantization != "none" or config.learner.float8 != "off":
        return FLOAT8_PROBE_TOLERANCE
    return PROBE_TOLERANCE[config.model.dtype]


def probe_floor(config: Config) -> float | None:
    """The least limit that the first update's gap may lead to; None: the limit is given."""
    if config.actors.probe_tolerance is not None:
        return None
    return PROBE_FLOOR * probe_tolerance(config)


def make_pool(
    prepared: Prepared, placement: Placement, log_dir: Path, console: Console
) -> RolloutPool:
    """The rollout actors, not started yet."""
    import ray

    spec = engine_spec(prepared, placement)

    def make_actor(name: str) -> Any:
        return (
            ray.remote(RolloutActor)
            .options(max_concurrency=10_000, **placement.rollout)
            .remote(name, spec, str(log_dir))
        )

    return RolloutPool(make_actor, prepared.config.actors, console.note)


def make_rewards(prepared: Prepared, placement: Placement) -> RewardPool:
    """The reward actors; Ray starts one again when it dies, for it holds no state."""
    import ray

    config = prepared.config.rewards
    actors = [
        ray.remote(RewardActor)
        .options(max_restarts=-1, **placement.reward)
        .remote(prepared.rewards, config.timeout_s, memory_bytes=config.memory_bytes)
        for _ in range(config.workers)
    ]
    group_size = prepared.config.task.group_size
    bound = longest_score_s(config.timeout_s, len(prepared.rewards), group_size)
    return RewardPool(actors, timeout_s=bound + 30)


def learner_spec(
    prepared: Prepared, placement: Placement, log_dir: Path, cores: int
) -> LearnerSpec:
    """Rank 0 of this run's learner; the others differ in their number only."""
    config = prepared.config
    ranks = config.learner.workers
    return LearnerSpec(
        model_path=prepared.model_path,
        dtype=config.model.dtype,
        learner=config.learner,
        algorithm=config.algorithm,
        temperature=config.actors.temperature,
        max_tokens=config.actors.max_tokens,
        rank=0,
        world_size=ranks,
        device=placement.device,
        threads=max(1, cores // ranks),
        seed=config.run.seed,
        shm_dir=f"/dev/shm/cohort-learner-{uuid.uuid4().hex[:12]}",
        log_dir=str(log_dir),
        total_steps=config.run.steps,
    )


async def start_learner(
    prepared: Prepared, placement: Placement, log_dir: Path, cores: int
) -> LearnerGroup:
    """The learner's ranks, ready to train from the model folder."""
    config = prepared.config
    ranks = config.learner.workers
    spec = learner_spec(prepared, placement, log_dir, cores)
    environment = cpu_environment(spec.threads) if placement.device == "cpu" else {}
    options = [
        {**placement.learner, "runtime_env": {"env_vars": environment}} for _ in range(ranks)
    ]
    return await LearnerGroup.start(spec, options, config.cluster.start_timeout_s)


async def run_training(config: Config) -> int:
    """Check, start, train, stop. Returns the exit code: 0 done, 130/143 stopped and saved.

    Raises one of EXPECTED_ERRORS when the run cannot start or go on.
    """
    prepared = prepare(config)
    # What can be known to fail is said before anything is written.
    if address := ray_address(config):
        check_reachable(address)
    else:
        plan(config, this_machine(), prepared.parameters)
    folder = claim_run_dir(config)
    console = Console(config.run.steps, config.tracking.console)
    with console:
        console.header(f"cohort: {folder}\n{compact(config)}")
        if prepared.overlong:
            console.note(f"{prepared.overlong} prompts are too long and left out")
        return await _train_in(prepared, folder, console)


async def _train_in(prepared: Prepared, folder: Path, console: Console) -> int:
    import ray

    config = prepared.config
    checkpoints = Checkpoints(
        folder / "checkpoints",
        config.run.keep_checkpoints,
        checkpoint_bytes(config, prepared.parameters),
    )
    checkpoints.require_space()
    resume_from = latest(folder / "checkpoints") if config.run.resume else None
    saved = load_state(resume_from) if resume_from else None
    if saved and saved["step"] >= config.run.steps:
        console.note(
            f"nothing to do: the checkpoint has {saved['step']} steps, run.steps is "
            f"{config.run.steps}"
        )
        return 0
    if config.run.resume and not saved:
        console.note("no complete checkpoint to resume from: starting at step 0")

    console.stage("starting Ray")
    placement = plan(config, connect(config), prepared.parameters)
    pool = make_pool(prepared, placement, folder / "logs", console)
    rewards = make_rewards(prepared, placement)
    learner: LearnerGroup | None = None
    tracker: Tracker | None = None
    exit_code = 1
    try:
        console.stage(
            f"starting {config.actors.count} engine(s), {config.learner.workers} learner rank(s), "
            f"{config.rewards.workers} reward worker(s)"
        )
        cores = int(this_machine().cpus)
        started = await asyncio.gather(
            start_learner(prepared, placement, folder / "logs", cores),
            pool.start(config.cluster.start_timeout_s),
            rewards.check(config.cluster.start_timeout_s),
        )
        learner, seconds = started[0], started[1]
        console.note(f"engine(s) started in {max(seconds):.1f} s")
        if resume_from and saved:
            console.stage(f"loading checkpoint {saved['step']}")
            await learner.load(resume_from)
        write_atomically(folder / "config.yaml", dump_config(config))
        first_step = saved["step"] if saved else 0
        tracker = Tracker(
            folder, config, saved["tracking"] if saved else None, first_step=first_step
        )
        console.note(tracker.describe())
        run = Run(
            config=config,
            pool=pool,
            learner=learner,
            stream=GroupStream(
                config,
                draw_from(prepared),
                pool,
                rewards,
                first_step,
                saved["cursor"] if saved else 0,
                rate_history(prepared, saved),
            ),
            tracker=tracker,
            scribe=Scribe(
                folder / "rollouts",
                config.tracking.samples_per_step,
                config.tracking.table_every,
                tracker,
            ),
            console=console,
            checkpoints=checkpoints,
            several_nodes=sum(node["Alive"] for node in ray.nodes()) > 1,
            probe_ids=first_probe(prepared),
            probe_tolerance=probe_tolerance(config),
            probe_floor=probe_floor(config),
            stop=asyncio.Event(),
            step=first_step,
            counters=Counters.resumed(saved["counters"])
            if saved
            else Counters(group_size=config.task.group_size),
        )
        caught = stop_on_signals(run.stop, console, "saving, then leaving")
        console.stage("publishing the first weights")
        await train(run)
        exit_code = 128 + caught[0] if caught else 0
        await say_goodbye(run, prepared)
        return exit_code
    finally:
        if tracker is not None:
            tracker.close(exit_code)
        shut_down(pool, rewards, learner)
        ray.shutdown()


def draw_from(prepared: Prepared) -> Any:
    """(cursor, count, pass rates) -> that many prompts and the cursor after them."""

    def draw(cursor: int, count: int, rates: PassRates) -> Taken:
        return take_prompts(
            prepared.task, prepared.renderer, prepared.config.run.seed, cursor, count, rates
        )

    return draw


def rate_history(prepared: Prepared, saved: dict[str, Any] | None) -> RateHistory | None:
    """The pass rates for a task that chooses its rows by them; None for other tasks."""
    if not isinstance(prepared.task, Curriculum):
        return None
    delay = prepared.config.actors.max_staleness
    if saved and saved["pass_rates"]:
        return RateHistory.resumed(saved["pass_rates"], delay)
    return RateHistory(delay)


def stop_on_signals(stop: asyncio.Event, console: Console, what: str) -> list[int]:
    """First Ctrl-C or SIGTERM: set `stop` and say what follows. A second one leaves at once.

    Returns a list that will hold the signal's number.
    """
    caught: list[int] = []

    def on_signal(number: int) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        console.note(f"{signal.Signals(number).name}: {what}; once more leaves at once")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return caught


async def say_goodbye(run: Run, prepared: Prepared) -> None:
    """The last lines: what was reached, what it took, what to do next."""
    folder = expand(prepared.config.run.dir)
    engines, ranks = await asyncio.gather(run.pool.memory(), run.learner.memory())
    learner = sum(rank["peak_rss_bytes"] for rank in ranks)
    run.console.note(
        f"peak memory: engines {engines / 2**30:.1f} GiB, learner {learner / 2**30:.1f} GiB"
    )
    if run.step < prepared.config.run.steps:
        run.console.note(
            f"stopped after step {run.step} of {prepared.config.run.steps}; to go on: add "
            "run.resume=true to the same command"
        )
    else:
        run.console.note(
            f"done: {run.step} steps. metrics: {folder}/metrics.jsonl, completions: "
            f"{folder}/rollouts, model: `cohort export {folder} OUT`"
        )


def shut_down(pool: RolloutPool, rewards: RewardPool, learner: LearnerGroup | None) -> None:
    """End every actor, whatever state the run is in; their watchers clean up after them."""
    pool.kill()
    rewards.kill()
    if learner is not None:
        learner.kill()
