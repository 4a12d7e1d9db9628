"""The stages of `cohort check`, cheapest first. Nothing is written to run.dir."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from cohort.cluster.commands.check.environment import check_environment
from cohort.cluster.commands.check.estimate import Architecture
from cohort.cluster.commands.check.machine import check_machine
from cohort.cluster.commands.check.model import Model, check_model, check_run_dir
from cohort.cluster.commands.check.prompts import check_prompts, check_task
from cohort.cluster.commands.check.rewards import Scorers, check_rewards
from cohort.cluster.commands.check.rollout import check_completions, generate
from cohort.cluster.commands.check.stages import CheckReport, Stage
from cohort.cluster.config import Config, compact
from cohort.cluster.continuing import Saved, compare
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.placement import this_machine
from cohort.cluster.prepare import Prepared
from cohort.cluster.ray_start import check_start, connect, ray_address
from cohort.learner.checkpoint import HF_FOLDER
from cohort.rewards.specs import RewardSpec
from cohort.rewards.tasks import Task


def check(config: Config, print_line: Callable[[str], None], prompts: int) -> int:
    """Try a run before it is started. Every stage is printed as it ends; what is started is ended.

    Args:
        config: The run's config.
        print_line: Takes each line of the report.
        prompts: How many prompts to generate completions for; 0 starts no engine.

    Returns:
        The exit code: 0, or 1 when the run could not work.
    """
    report = CheckReport(print_line)
    saved: Saved | None = None
    model: Model | None = None
    task: Task | None = None
    specs: Sequence[RewardSpec] = ()
    with report.stage("config") as stage:
        stage.say(compact(config))
    with report.stage("run.dir") as stage:
        saved = check_run_dir(config, stage)
    with report.stage("model") as stage:
        model = check_model(config, stage)
    with report.stage("task") as stage:
        task, specs = check_task(config, stage)
    if model is not None and task is not None:
        with ExitStack() as started:
            _check_with(config, model, task, specs, saved, prompts, report, started)
    return report.conclude()


def _check_with(
    config: Config,
    model: Model,
    task: Task,
    specs: Sequence[RewardSpec],
    saved: Saved | None,
    count: int,
    report: CheckReport,
    started: ExitStack,
) -> None:
    """The stages that need a model and a task; `started` ends what they start."""
    if saved is not None:
        with report.stage("resume") as stage:
            now = fingerprint(config, model.path, task, specs)
            changed = compare(config, saved, now)
            stage.say(changed or "config, rows and model are those of the checkpoint")
    if config.task.environment is not None:
        with report.stage("environment") as stage:
            check_environment(config, model.path, model.tokenizer, stage)
    prepared: Prepared | None = None
    with report.stage("prompts") as stage:
        prepared, prompts = check_prompts(config, model, task, specs, stage)
    if prepared is None:
        return
    with report.stage("resources") as stage:
        _check_resources(prepared, model.architecture, stage, started)
    scorers: Scorers | None = None
    with report.stage("rewards on made-up completions") as stage:
        scorers = Scorers(config, specs)
        started.callback(scorers.close)
        check_rewards(config, scorers, task, prompts, model.tokenizer, stage)
    if not count:
        return
    with report.stage("generated completions") as stage:
        if report.problems or scorers is None:
            stage.say("not tried, because of the problems above")
            return
        step, cursor = 0, 0
        if saved is not None:
            step, cursor = saved.step, saved.state["cursor"]
            prepared = replace(prepared, model_path=str(saved.checkpoint / HF_FOLDER))
        sampled = prepared.draw(cursor, count)
        stage.say(f"starting {config.actors.count} engine(s)")
        made = asyncio.run(generate(prepared, sampled.prompts, step))
        check_completions(config, made, scorers, stage)


def _check_resources(
    prepared: Prepared, architecture: Architecture | None, stage: Stage, started: ExitStack
) -> None:
    config = prepared.config
    check_start(config)
    here = ray_address(config) is None
    if here:
        have = this_machine()
    else:
        import ray

        have = connect(config)
        started.callback(ray.shutdown)
    check_machine(prepared, architecture, have, here, stage)
