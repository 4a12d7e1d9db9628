"""`cohort train`: from a prepared config to a running job and an exit code."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from pydantic import JsonValue

from cohort.cluster.config import Config, compact, dump_config, expand
from cohort.cluster.continuing import (
    NEW_RUN,
    Saved,
    compare,
    planned_saves,
    saved_ahead,
    where_to_go_on,
    write_config,
)
from cohort.cluster.errors import RunError
from cohort.cluster.evaluation import HeldOut
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.journal.opening import JOURNAL, open_journal
from cohort.cluster.launch import Services, launch
from cohort.cluster.loop import train
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import Counters
from cohort.cluster.observe.rollouts import RolloutWriter
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.placement import checkpoint_bytes
from cohort.cluster.prepare import Prepared, prepare
from cohort.cluster.publishing import Publisher
from cohort.cluster.ray_start import check_start
from cohort.cluster.ray_watch import Loss, unless_ray_dies
from cohort.cluster.run import Progress, Recorder, Run, Saves
from cohort.cluster.run_dir import RunDir, claim_run_dir
from cohort.cluster.signals import Signals, Stopped
from cohort.cluster.stream import GroupStream
from cohort.cluster.waiting import stacks_on_request, tell_when_slow
from cohort.learner.checkpoint import Checkpoints
from cohort.rewards.rates import RateHistory
from cohort.rewards.tasks import Curriculum

GOODBYE_S = 30


async def run_training(config: Config) -> int:
    """Check, start, train, stop.

    Returns:
        The exit code: 0 done, 128 + a signal's number when that stopped it; what was trained is
        saved then.

    Raises:
        CohortError: the run cannot start or go on.
    """
    stacks_on_request()
    with Signals() as signals:
        try:
            prepared = prepare(config)
            config = prepared.config
            # What can be known to fail is said before anything is written.
            check_start(config, prepared.parameters, prepared.trained)
            signals.check()
            with (
                claim_run_dir(config) as run_dir,
                Console(config.run.steps, config.tracking.console) as console,
            ):
                console.note(
                    f"cohort: {run_dir.path}\n{compact(config)}\n"
                    "every other key has its default; config.yaml there has them all"
                )
                if overlong := prepared.lengths.overlong:
                    console.note(f"{overlong} prompts are too long and left out")
                signals.check()
                return await signals.cancel(_train_in(prepared, run_dir, console, signals))
        except Stopped as stopped:
            print(f"{stopped}: stopped before training", flush=True)
            return stopped.exit_code


async def _train_in(prepared: Prepared, run_dir: RunDir, console: Console, signals: Signals) -> int:
    config = prepared.config
    saved = where_to_go_on(config, run_dir.path)
    if saved and saved.step >= config.run.steps:
        console.note(
            f"nothing to do: the checkpoint has {saved.step} steps, run.steps is {config.run.steps}"
        )
        return 0
    if config.run.resume and not saved:
        console.note("no complete checkpoint to resume from: starting at step 0")
    now = fingerprint(
        config, prepared.model_path, prepared.task, prepared.rewards, prepared.init_from
    )
    if saved:
        if changed := compare(config, saved, now):
            console.note(changed)
        before = saved.state.get("fingerprint")
        if before and "init_from" in before:
            now["init_from"] = before["init_from"]
    elif prepared.init_from is not None:
        console.note(f"starting from the weights in {prepared.init_from}")
    held_out = HeldOut.of(prepared, console) if config.run.evaluate_every else None
    first_step = saved.step if saved else 0
    checkpoints = Checkpoints(
        run_dir.path / "checkpoints",
        config.run.keep_checkpoints,
        checkpoint_bytes(config, prepared.parameters, prepared.trained),
        run_dir.aside,
    )
    checkpoints.require_space(planned_saves(config, first_step))
    async with AsyncExitStack() as stack:
        with checkpoints.trial() as trial:
            actors = await stack.enter_async_context(
                launch(prepared, console, run_dir.path / "logs", signals=signals, trial=trial)
            )
        if saved:
            console.stage(f"loading checkpoint {saved.step}")
            await actors.learner.load(saved.checkpoint)
        signals.check()
        try:
            saves = Saves(checkpoints, now, first_step)
            run = assemble(prepared, run_dir, console, actors, saved, saves, held_out)
        except OSError as error:
            raise RunError(f"run.dir={run_dir.path} cannot be written: {error}") from error
        exit_code = 1
        try:
            signals.then(lambda: stop(run, signals))
            console.stage("publishing the first weights")
            await train_watched(run)
            exit_code = 0 if signals.caught is None else 128 + signals.caught
            await say_goodbye(run)
        finally:
            signals.then(lambda: None)
            run.recorder.tracker.close(exit_code)
    return exit_code


async def train_watched(run: Run) -> None:
    """`train`, given up when a process of Ray's dies: nothing would be answered any more."""

    def lost(loss: Loss) -> None:
        run.lost = loss

    def stop() -> None:
        run.console.note("Ray's GCS is gone: saving, then leaving")
        run.stop.set()

    telling = asyncio.ensure_future(
        tell_when_slow(lambda: run.progress.step, run.stream.pending, run.console.note)
    )
    try:
        await unless_ray_dies(train(run), run.actors.servers, lost, stop)
    finally:
        telling.cancel()


def assemble(
    prepared: Prepared,
    run_dir: RunDir,
    console: Console,
    actors: Services,
    saved: Saved | None,
    saves: Saves,
    held_out: HeldOut | None = None,
) -> Run:
    """The run, ready to train. From here on the folder holds this run; what was in its way is
    moved aside."""
    config, folder = prepared.config, run_dir.path
    state = saved.state if saved else NEW_RUN
    # First: it may be damaged.
    threads = actors.learner.spec.threads
    journal = open_journal(config, run_dir, saves.step, saves.fingerprint, threads, console)
    write_config(folder / "config.yaml", dump_config(config), run_dir.aside)
    tracker = Tracker(folder, config, state["tracking"], first_step=saves.step, aside=run_dir.aside)
    console.note(tracker.describe())
    if replaced := run_dir.aside.describe():
        console.note(replaced)
    writer = RolloutWriter(
        folder / "rollouts",
        folder / JOURNAL,
        config.tracking.samples_per_step,
        config.tracking.table_every,
        tracker.table,
    )
    saves.best = state.get("best")
    counters = Counters.resumed(state["counters"], config.task.group_size)
    stream = GroupStream(
        config,
        prepared.draw,
        actors.pool,
        actors.rewards,
        saves.step,
        state["cursor"],
        rate_history(prepared, state["pass_rates"]),
        journal,
        saved_ahead(state),
    )
    return Run(
        config=config,
        actors=actors,
        publisher=Publisher.of(prepared, actors),
        stream=stream,
        journal=journal,
        recorder=Recorder(tracker, writer, console),
        saves=saves,
        progress=Progress(saves.step, state["cursor"], counters, stream.ahead()),
        held_out=held_out,
    )


def rate_history(prepared: Prepared, saved: dict[str, JsonValue] | None) -> RateHistory | None:
    """The pass rates for a task that chooses its rows by them; None for other tasks.

    Args:
        prepared: With the task.
        saved: The rates of a checkpoint; None: there is none.
    """
    if not isinstance(prepared.task, Curriculum):
        return None
    delay = prepared.config.actors.max_staleness
    return RateHistory.resumed(saved, delay) if saved else RateHistory(delay)


def stop(run: Run, signals: Signals) -> None:
    """The first signal during training: finish the step, save, leave."""
    run.console.note(f"{signals.name()}: saving, then leaving; a second signal leaves at once")
    run.stop.set()


async def say_goodbye(run: Run) -> None:
    """The last lines: what was reached, what it took, what to do next. Raises nothing."""
    console, step, steps = run.console, run.progress.step, run.config.run.steps
    folder = expand(run.config.run.dir)
    try:
        async with asyncio.timeout(GOODBYE_S):
            engines, ranks = await asyncio.gather(run.actors.pool.memory(), run.learner.memory())
    except Exception as error:  # noqa: BLE001 - all is done and saved
        console.note(f"peak memory: not known ({type(error).__name__}: {error})")
    else:
        learner = sum(rank["peak_rss_bytes"] for rank in ranks)
        console.note(
            f"peak memory: engines {engines / 2**30:.1f} GiB, learner {learner / 2**30:.1f} GiB"
        )
    if run.recorder.missed:
        missed = ", ".join(f"{what} of {n} steps" for what, n in run.recorder.missed.items())
        console.note(f"not recorded: {missed}")
    if step < steps:
        console.note(
            f"stopped after step {step} of {steps}; to go on: add run.resume=true to the same "
            "command"
        )
    else:
        console.note(
            f"done: {step} steps. metrics: {folder}/metrics.jsonl, completions: "
            f"{folder}/rollouts, model: `cohort export {folder} OUT`"
        )
