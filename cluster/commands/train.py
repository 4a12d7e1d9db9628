"""From a prepared config to a running job and an exit code: start, train, leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cohort.actors.pool import RolloutPool
from cohort.cluster.config import Config, compact, dump_config, expand
from cohort.cluster.continuing import Saved, compare, planned_saves, where_to_go_on, write_config
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.loop import train
from cohort.cluster.making import (
    draw_from,
    make_pool,
    make_rewards,
    probe_floor,
    probe_tolerance,
    rate_history,
    start_learner,
)
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters
from cohort.cluster.observe.rollout_writer import RolloutWriter
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.placement import (
    Placement,
    Resources,
    checkpoint_bytes,
    plan,
    this_machine,
)
from cohort.cluster.prepare import Prepared, RunError, first_probe, prepare
from cohort.cluster.ray_start import check_start, connect, ray_address
from cohort.cluster.recording import Run
from cohort.cluster.run_dir import RunDir, claim_run_dir
from cohort.cluster.signals import Signals, Stopped
from cohort.cluster.stream import GroupStream
from cohort.learner.checkpoint import Checkpoints
from cohort.learner.learner import Learner
from cohort.rewards.pool import RewardPool

# How often our signal handlers are set again while Ray sets its own.
HANDLERS_S = 0.05
GOODBYE_S = 30
# Without these nothing that a Ray of our own runs goes on.
RAY_SERVERS = {"raylet", "gcs_server"}
WATCH_S = 5.0


async def run_training(config: Config) -> int:
    """Check, start, train, stop. Returns the exit code: 0 done, 128 + a signal's number when that
    stopped it; what was trained is saved then.

    Raises CohortError when the run cannot start or go on.
    """
    with Signals() as signals:
        try:
            prepared = prepare(config)
            # What can be known to fail is said before anything is written.
            check_start(config)
            if ray_address(config) is None:
                plan(config, this_machine(), prepared.parameters)
            signals.check()
            with (
                claim_run_dir(config) as run_dir,
                Console(config.run.steps, config.tracking.console) as console,
            ):
                console.header(
                    f"cohort: {run_dir.path}\n{compact(config)}\n"
                    "every other key has its default; config.yaml there has them all"
                )
                if prepared.overlong:
                    console.note(f"{prepared.overlong} prompts are too long and left out")
                signals.check()
                return await _train_in(prepared, run_dir, console, signals)
        except Stopped as stopped:
            print(f"{stopped}: stopped before training", flush=True)
            return stopped.exit_code


async def _train_in(prepared: Prepared, run_dir: RunDir, console: Console, signals: Signals) -> int:
    import ray

    config = prepared.config
    saved = where_to_go_on(config, run_dir.path)
    if saved and saved.step >= config.run.steps:
        console.note(
            f"nothing to do: the checkpoint has {saved.step} steps, run.steps is {config.run.steps}"
        )
        return 0
    if config.run.resume and not saved:
        console.note("no complete checkpoint to resume from: starting at step 0")
    now = fingerprint(config, prepared.model_path, prepared.task, prepared.rewards)
    if saved and (changed := compare(config, saved, now)):
        console.note(changed)
    first_step = saved.step if saved else 0
    checkpoints = Checkpoints(
        run_dir.path / "checkpoints",
        config.run.keep_checkpoints,
        checkpoint_bytes(config, prepared.parameters),
        run_dir.aside,
    )
    checkpoints.require_space(planned_saves(config, first_step))

    actors = Actors()
    run: Run | None = None
    exit_code = 1
    try:
        with checkpoints.trial() as trial:
            starting = asyncio.ensure_future(
                start(prepared, run_dir, console, actors, saved, trial, signals)
            )
            signals.then(starting.cancel)
            try:
                await starting
            except asyncio.CancelledError:
                signals.check()
                raise
            signals.check()
        try:
            run = assemble(prepared, run_dir, console, actors, saved, checkpoints)
            run.fingerprint = now
        except OSError as error:
            raise RunError(f"run.dir={run_dir.path} cannot be written: {error}") from error
        signals.then(lambda: stop(run, console, signals))
        console.stage("publishing the first weights")
        await train_watched(run)
        exit_code = 0 if signals.caught is None else 128 + signals.caught
        await say_goodbye(run, prepared)
        return exit_code
    finally:
        signals.then(lambda: None)
        if run is not None:
            run.tracker.close(exit_code)
        try:
            actors.kill()
            ray.shutdown()
        except Exception as error:  # noqa: BLE001 - how the run ended is known already
            console.note(f"not every actor could be ended: {type(error).__name__}: {error}")


@dataclass
class Actors:
    """What of a run lives in other processes, as far as it was started."""

    placement: Placement | None = None
    pool: RolloutPool | None = None
    rewards: RewardPool | None = None
    learner: Learner | None = None

    def kill(self) -> None:
        """End every actor, whatever state the run is in; their watchers clean up after them."""
        if self.pool is not None and self.rewards is not None:
            shut_down(self.pool, self.rewards, self.learner)


async def start(
    prepared: Prepared,
    run_dir: RunDir,
    console: Console,
    actors: Actors,
    saved: Saved | None,
    trial: Path,
    signals: Signals,
) -> None:
    """Start Ray and every actor, and load the checkpoint; `actors` holds what was started."""
    config = prepared.config
    console.stage("starting Ray")
    have = await connect_aside(config, signals)
    placement = actors.placement = plan(config, have, prepared.parameters)
    pool = actors.pool = make_pool(prepared, placement, run_dir.path / "logs", console)
    rewards = actors.rewards = make_rewards(prepared, placement, console)
    console.stage(
        f"starting {config.actors.count} engine(s), {config.learner.workers} learner rank(s), "
        f"{config.rewards.workers} reward worker(s)"
    )
    cores = int(this_machine().cpus)

    async def learner() -> None:
        actors.learner = await start_learner(
            prepared, placement, run_dir.path / "logs", cores, trial
        )

    async def engines() -> None:
        seconds = await pool.start(config.cluster.start_timeout_s)
        console.note(f"engine(s) started in {max(seconds):.1f} s")

    await together(learner(), engines(), rewards.check(config.cluster.start_timeout_s))
    if saved and actors.learner is not None:
        console.stage(f"loading checkpoint {saved.step}")
        await actors.learner.load(saved.checkpoint)


async def train_watched(run: Run) -> None:
    """`train`, given up when a process of our own Ray dies: nothing would be answered any more."""
    servers = [process for process in psutil.Process().children() if process.name() in RAY_SERVERS]
    training = asyncio.ensure_future(train(run))
    try:
        while servers and not training.done():
            await asyncio.wait({training}, timeout=WATCH_S)
            for process in servers:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    run.lost = f"Ray's process {process.pid} died, and every actor with it"
                    training.cancel()
        await training
    except asyncio.CancelledError:
        if run.lost:
            raise RunError(f"{run.lost}; the ends of Ray's logs show why") from None
        training.cancel()
        await asyncio.wait({training})
        raise


async def connect_aside(config: Config, signals: Signals) -> Resources:
    """`connect` in a thread: it takes seconds, in which a signal must be heard.

    Ray sets handlers of its own meanwhile, which print native stacks and exit with 15; ours are set
    again until it is done.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    connecting = asyncio.ensure_future(asyncio.to_thread(connect, config, this_machine()))
    try:
        while not connecting.done():
            await asyncio.wait({connecting}, timeout=HANDLERS_S)
            signals.install()
    except asyncio.CancelledError:
        # Half of a Ray cannot be shut down.
        await asyncio.wait({connecting})
        signals.install()
        raise
    return connecting.result()


async def together(*work: Coroutine[Any, Any, Any]) -> None:
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


def assemble(
    prepared: Prepared,
    run_dir: RunDir,
    console: Console,
    actors: Actors,
    saved: Saved | None,
    checkpoints: Checkpoints,
) -> Run:
    """The run, ready to train. From here on the folder holds this run; what was in its way is
    moved aside."""
    import ray

    config, folder = prepared.config, run_dir.path
    pool, rewards, learner = actors.pool, actors.rewards, actors.learner
    assert pool is not None and rewards is not None and learner is not None
    state = saved.state if saved else None
    first_step = saved.step if saved else 0
    write_config(folder / "config.yaml", dump_config(config), run_dir.aside)
    tracker = Tracker(
        folder,
        config,
        state["tracking"] if state else None,
        first_step=first_step,
        aside=run_dir.aside,
    )
    console.note(tracker.describe())
    if replaced := run_dir.aside.describe():
        console.note(replaced)
    counters = (
        Counters.resumed(state["counters"], config.task.group_size)
        if state
        else Counters(group_size=config.task.group_size)
    )
    return Run(
        config=config,
        pool=pool,
        learner=learner,
        stream=GroupStream(
            config,
            draw_from(prepared),
            pool,
            rewards,
            first_step,
            state["cursor"] if state else 0,
            rate_history(prepared, state),
        ),
        tracker=tracker,
        writer=RolloutWriter(
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
        counters=counters,
    )


def stop(run: Run, console: Console, signals: Signals) -> None:
    """The first signal during training: finish what is in hand, save, leave."""
    console.note(f"{signals.name()}: saving, then leaving; once more leaves at once")
    run.stop.set()


async def say_goodbye(run: Run, prepared: Prepared) -> None:
    """The last lines: what was reached, what it took, what to do next. Raises nothing."""
    folder = expand(prepared.config.run.dir)
    try:
        async with asyncio.timeout(GOODBYE_S):
            engines, ranks = await asyncio.gather(run.pool.memory(), run.learner.memory())
    except Exception as error:  # noqa: BLE001 - all is done and saved
        run.console.note(f"peak memory: not known ({type(error).__name__}: {error})")
    else:
        learner = sum(rank["peak_rss_bytes"] for rank in ranks)
        run.console.note(
            f"peak memory: engines {engines / 2**30:.1f} GiB, learner {learner / 2**30:.1f} GiB"
        )
    missed = ", ".join(f"{name} of {count} steps" for name, count in run.missed.items())
    if missed:
        run.console.note(f"not recorded: {missed}")
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


def shut_down(pool: RolloutPool, rewards: RewardPool, learner: Learner | None) -> None:
    """End every actor, whatever state the run is in; their watchers clean up after them."""
    pool.kill()
    rewards.kill()
    if learner is not None:
        learner.kill()
