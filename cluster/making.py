"""What a run is made of, made from its config: engines, reward workers, learner, prompts."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from cohort.actors.engine import EngineSpec
from cohort.actors.pool import RolloutPool
from cohort.actors.process import SHM
from cohort.actors.rollout import RolloutActor
from cohort.cluster.config import Config
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import Placement, cpu_environment
from cohort.cluster.prepare import Prepared
from cohort.learner.learner import Learner
from cohort.learner.spec import LearnerSpec
from cohort.rewards.environments.handle import EnvironmentHandle, EnvironmentPool
from cohort.rewards.environments.worker import EnvironmentWorker
from cohort.rewards.handle import RewardHandle
from cohort.rewards.pool import RewardPool
from cohort.rewards.rates import PassRates, RateHistory
from cohort.rewards.tasks import Curriculum, SampledPrompts, sample_prompts
from cohort.rewards.worker import RewardWorker, longest_score_s, watched_worker_class

if TYPE_CHECKING:
    from ray.actor import ActorProxy

# Engine and learner use different kernels: the gap is about 0.1 in bfloat16, an eighth of that in
# float16, below 1e-4 in float32.
PROBE_TOLERANCE = {"bfloat16": 0.5, "float16": 0.1, "float32": 0.01}
FLOAT8_PROBE_TOLERANCE = 1.0
# What is derived from the first update's gap is no less than this share of them.
PROBE_FLOOR = 0.1


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


def make_environments(prepared: Prepared, placement: Placement) -> EnvironmentPool | None:
    """The workers of environments; Ray starts one again when it dies. None: there is none."""
    import ray

    spec = prepared.environment
    if spec is None:
        return None
    config = prepared.config.environments
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
) -> RolloutPool:
    """The rollout actors, not started yet."""
    import ray

    spec = engine_spec(prepared, placement)

    def make_actor(name: str) -> ActorProxy[RolloutActor]:
        return (
            ray.remote(RolloutActor)
            .options(max_concurrency=10_000, **placement.rollout)
            .remote(name, spec, str(log_dir))
        )

    next_host = None if environments is None else environments.next
    return RolloutPool(make_actor, prepared.config.actors, console.note, next_host)


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


def learner_spec(
    prepared: Prepared, placement: Placement, log_dir: Path, cores: int, trial: Path | None = None
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
        shm_dir=f"{SHM}/cohort-learner-{os.getpid()}-{uuid.uuid4().hex[:12]}",
        log_dir=str(log_dir),
        total_steps=config.run.steps,
        trial_dir=None if trial is None else str(trial),
    )


async def start_learner(
    prepared: Prepared, placement: Placement, log_dir: Path, cores: int, trial: Path | None = None
) -> Learner:
    """The learner's ranks, ready to train from the model folder.

    trial: where they try to save first (see `Checkpoints.trial`); None: nothing will be saved.
    """
    config = prepared.config
    ranks = config.learner.workers
    spec = learner_spec(prepared, placement, log_dir, cores, trial)
    environment = cpu_environment(spec.threads) if placement.device == "cpu" else {}
    options = [
        {**placement.learner, "runtime_env": {"env_vars": environment}} for _ in range(ranks)
    ]
    return await Learner.start(spec, options, config.cluster.start_timeout_s)


def draw_from(prepared: Prepared) -> Any:
    """(cursor, count, pass rates) -> that many prompts and the cursor after them."""

    def draw(cursor: int, count: int, rates: PassRates) -> SampledPrompts:
        return sample_prompts(
            prepared.task, prepared.renderer, prepared.config.run.seed, cursor, count, rates
        )

    return draw


def rate_history(prepared: Prepared, saved: dict[str, JsonValue] | None) -> RateHistory | None:
    """The pass rates for a task that chooses its rows by them; None for other tasks.

    saved: those of a checkpoint.
    """
    if not isinstance(prepared.task, Curriculum):
        return None
    delay = prepared.config.actors.max_staleness
    if saved:
        return RateHistory.resumed(saved, delay)
    return RateHistory(delay)
