"""From a config to a running job, and back to an exit code: check, start, train, leave nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import uuid
from dataclasses import dataclass
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
    connected_cluster,
    cpu_environment,
    plan,
    this_machine,
)
from cluster.scribe import Scribe
from cluster.stream import GroupStream
from cluster.tracking import Tracker, write_atomically
from learner.checkpoint import Checkpoints, latest, load_state
from learner.group import LearnerError, LearnerGroup
from learner.worker import LearnerSpec
from rewards.pool import RewardPool
from rewards.tasks import (
    PromptRenderer,
    Taken,
    Task,
    TaskError,
    load_task,
    sample_rows,
    split_overlong,
    take_prompts,
)
from rewards.worker import RewardActor, RewardSpec, reward_specs

CONNECT_TIMEOUT_S = 10
PROBE_TOKENS = 32
# Engine and learner use different kernels: the gap is about 0.1 in bfloat16, below 1e-4 in float32.
PROBE_TOLERANCE = {"bfloat16": 0.5, "float32": 0.01}


class RunError(Exception):
    """The run cannot start; the message says why and which key to change."""


EXPECTED_ERRORS = (
    ConfigError,
    LearnerError,
    PlacementError,
    RolloutError,
    RunError,
    TaskError,
    TrainingError,
)
"""Errors whose message is meant for people: shown without a traceback."""


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is started."""

    config: Config
    model_path: str
    parameters: int
    task: Task
    rewards: list[RewardSpec]
    renderer: PromptRenderer
    max_length: int
    overlong: int


def prepare(config: Config) -> Prepared:
    """Load and check everything that needs no actor: model folder, task, rewards, lengths.

    Raises the errors of EXPECTED_ERRORS; writes nothing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path, context, parameters = inspect_model(config)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"model.path={path}: its tokenizer cannot be loaded: {error}") from error
    task = load_task(config.task, config.run.seed)
    specs = reward_specs(task, config.rewards)
    # Loads every function in a child process, as the reward actors will: a wrong path ends here.
    RewardActor(specs, config.rewards.timeout_s).close()
    longest_allowed = (config.model.max_length or context) - config.actors.max_tokens
    if config.model.max_length and config.model.max_length > context:
        raise RunError(
            f"model.max_length={config.model.max_length} exceeds the model's context of {context}"
        )
    if longest_allowed < 1:
        raise RunError(
            f"actors.max_tokens={config.actors.max_tokens} fills the model's context of {context} "
            "and leaves no room for a prompt"
        )
    renderer = PromptRenderer(tokenizer, longest_allowed)
    longest, overlong = check_lengths(config, task, renderer)
    return Prepared(
        config=config,
        model_path=path,
        parameters=parameters,
        task=task,
        rewards=specs,
        renderer=renderer,
        max_length=config.model.max_length or longest + config.actors.max_tokens,
        overlong=overlong,
    )


def inspect_model(config: Config) -> tuple[str, int, int]:
    """The model's local path or hub id, its context length in tokens, its number of parameters.

    Raises RunError when there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    given = config.model.path
    folder = expand(given)
    local = folder.is_dir()
    if not local and (given.startswith(("/", "~", ".", "$")) or given.count("/") != 1):
        raise RunError(f"model.path={given}: there is no such folder")
    if local and not (folder / "config.json").is_file():
        raise RunError(f"model.path={given}: the folder holds no config.json")
    path = str(folder.resolve()) if local else given
    try:
        model_config = AutoConfig.from_pretrained(path)
        import torch

        # On the meta device: shapes without memory.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"model.path={given}: cannot be loaded: {error}") from error
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return path, int(model_config.max_position_embeddings), parameters


def check_lengths(config: Config, task: Task, renderer: PromptRenderer) -> tuple[int, int]:
    """The longest prompt that will be used, in tokens, and how many are too long.

    Raises TaskError when a prompt is too long and task.overlong=error, or when all are.
    """
    size = task.train_size()
    prompts = [renderer.render(row, 0) for _, row in sample_rows(task, config.run.seed, 0, size)]
    prompts += [renderer.render(task.eval_row(i), 0) for i in range(task.eval_size())]
    fitting, overlong = split_overlong(prompts, renderer.max_prompt_tokens)
    if overlong and config.task.overlong == "error":
        worst = max(overlong, key=lambda prompt: len(prompt.token_ids))
        raise TaskError(
            f"{len(overlong)} of {len(prompts)} prompts are longer than "
            f"{renderer.max_prompt_tokens} tokens, which is what the context leaves beside "
            f"actors.max_tokens={config.actors.max_tokens}; the longest, {worst.id}, has "
            f"{len(worst.token_ids)}. Raise model.max_length, lower actors.max_tokens, or set "
            "task.overlong=drop"
        )
    if not fitting:
        raise TaskError(f"every prompt is longer than {renderer.max_prompt_tokens} tokens")
    return max(len(prompt.token_ids) for prompt in fitting), len(overlong)


def claim_run_dir(config: Config) -> Path:
    """The run's folder, made if needed.

    Raises RunError when it cannot be written, or holds a run that is not to be continued.
    """
    folder = expand(config.run.dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir={folder} is a file")
    holds = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if (folder / "config.yaml").exists() and not config.run.resume:
        raise RunError(
            f"run.dir={folder} already holds a run: add run.resume=true to continue it, or "
            "choose another run.dir"
        )
    if holds - {"logs"} and "config.yaml" not in holds:
        raise RunError(f"run.dir={folder} holds other files and no run: choose another run.dir")
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / "logs" / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"run.dir={folder} cannot be written: {error.strerror}") from error
    return folder


def first_probe(prepared: Prepared) -> list[int]:
    """A fixed token sequence made of the task's own prompts: what engines are compared on."""
    ids: list[int] = []
    rows = sample_rows(prepared.task, 0, 0, prepared.task.train_size())
    while len(ids) < 2:
        for epoch, row in rows:
            ids += prepared.renderer.render(row, epoch).token_ids
            if len(ids) >= PROBE_TOKENS:
                break
    return ids[: min(PROBE_TOKENS, prepared.max_length - 1)]


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
        num_cpus=int(have.cpus), include_dashboard=False, object_store_memory=512 * 2**20, **options
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
        seed=config.run.seed,
    )


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
        .remote(prepared.rewards, config.timeout_s)
        for _ in range(config.workers)
    ]
    # Every function may take its whole deadline, and its child may have to be started again.
    return RewardPool(actors, timeout_s=(config.timeout_s + 60) * len(prepared.rewards) + 30)


async def start_learner(
    prepared: Prepared, placement: Placement, log_dir: Path, cores: int
) -> LearnerGroup:
    """The learner's ranks, ready to train from the model folder."""
    config = prepared.config
    ranks = config.learner.workers
    threads = max(1, cores // ranks)
    spec = LearnerSpec(
        model_path=prepared.model_path,
        dtype=config.model.dtype,
        learner=config.learner,
        algorithm=config.algorithm,
        temperature=config.actors.temperature,
        max_tokens=config.actors.max_tokens,
        rank=0,
        world_size=ranks,
        device=placement.device,
        threads=threads,
        seed=config.run.seed,
        shm_dir=f"/dev/shm/cohort-learner-{uuid.uuid4().hex[:12]}",
        log_dir=str(log_dir),
    )
    environment = cpu_environment(threads) if placement.device == "cpu" else {}
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
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
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
            probe_tolerance=config.actors.probe_tolerance or PROBE_TOLERANCE[config.model.dtype],
            stop=asyncio.Event(),
            step=first_step,
            counters=Counters.resumed(saved["counters"])
            if saved
            else Counters(group_size=config.task.group_size),
        )
        caught = stop_on_signals(run)
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
    """cursor -> the prompts of one step and the cursor after them."""

    def draw(cursor: int) -> Taken:
        return take_prompts(
            prepared.task,
            prepared.renderer,
            prepared.config.run.seed,
            cursor,
            prepared.config.task.prompts_per_step,
        )

    return draw


def stop_on_signals(run: Run) -> list[int]:
    """First Ctrl-C or SIGTERM: finish the step in hand and save. A second one leaves at once."""
    caught: list[int] = []

    def on_signal(number: int) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        run.console.note(
            f"{signal.Signals(number).name}: saving, then leaving; once more leaves at once"
        )
        run.stop.set()

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
