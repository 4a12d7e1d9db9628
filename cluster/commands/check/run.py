"""The stages of `cohort check`, cheapest first. Nothing is written to run.dir."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cohort.actors.records import Prompt
from cohort.cluster.commands.check.judges import Judges, check_rewards, demonstrations
from cohort.cluster.commands.check.machine import check_machine
from cohort.cluster.commands.check.model import Model, Resumed, check_model, check_run_dir
from cohort.cluster.commands.check.prompts import check_prompts, check_task
from cohort.cluster.commands.check.rollout import check_completions, generate
from cohort.cluster.commands.check.sheet import CheckReport, Stage
from cohort.cluster.config import SECTIONS, Config
from cohort.cluster.continuing import compare
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.lengths import Lengths
from cohort.cluster.placement import Placement, this_machine
from cohort.cluster.prepare import Prepared
from cohort.cluster.ray_start import check_start, connect, ray_address
from cohort.rewards.tasks import PromptRenderer, Task, sample_prompts
from cohort.rewards.worker import RewardSpec


@dataclass
class Found:
    """What earlier stages found; None where one failed or was not reached."""

    resumed: Resumed | None = None
    model: Model | None = None
    task: Task | None = None
    specs: Sequence[RewardSpec] = ()
    renderer: PromptRenderer | None = None
    prompts: Sequence[Prompt] = ()
    lengths: Lengths | None = None
    placement: Placement | None = None
    connected: bool = False


def check(config: Config, print_line: Callable[[str], None], prompts: int) -> int:
    """Try a run before it is started; the exit code: 0, or 1 when it could not work.

    Every stage is printed as it ends. prompts: for how many completions are generated; 0 starts no
    engine. What is started is ended.
    """
    sheet, found = CheckReport(print_line), Found()
    with sheet.stage("config") as stage:
        stage.say(chosen(config))
    with sheet.stage("run.dir") as stage:
        found.resumed = check_run_dir(config, stage)
    with sheet.stage("model") as stage:
        found.model = check_model(config, stage)
    with sheet.stage("task") as stage:
        found.task, found.specs = check_task(config, stage)
    if found.resumed and found.model and found.task:
        with sheet.stage("resume") as stage:
            now = fingerprint(config, found.model.path, found.task, found.specs)
            changed = compare(config, found.resumed.saved, now)
            stage.say(changed or "config, rows and model are those of the checkpoint")
    if found.model and found.task:
        with sheet.stage("prompts") as stage:
            found.renderer, found.prompts, found.lengths = check_prompts(
                config, found.model, found.task, found.specs, stage
            )
    try:
        if found.model and found.lengths:
            with sheet.stage("resources") as stage:
                found.placement = _resources(config, found, stage)
        if found.model and found.prompts:
            _rewards_and_completions(config, sheet, found, found.model, prompts)
    finally:
        if found.connected:
            import ray

            ray.shutdown()
    return sheet.conclude()


def _resources(config: Config, found: Found, stage: Stage) -> Placement:
    assert found.model is not None and found.lengths is not None
    address = ray_address(config)
    check_start(config)
    if address:
        have = connect(config)
        found.connected = True
    else:
        have = this_machine()
    return check_machine(config, found.model, found.lengths, have, not address, stage)


def _rewards_and_completions(
    config: Config, sheet: CheckReport, found: Found, model: Model, prompts: int
) -> None:
    judges: Judges | None = None
    try:
        with sheet.stage("rewards on made-up completions") as stage:
            judges = Judges(config, found.specs)
            assert found.task is not None
            shown = demonstrations(found.task)
            check_rewards(config, judges, found.prompts, shown, model.tokenizer, stage)
        if prompts:
            with sheet.stage("generated completions") as stage:
                if judges is None or sheet.problems:
                    stage.say("not tried, because of the problems above")
                else:
                    _completions(config, found, judges, prompts, stage)
    finally:
        if judges is not None:
            judges.close()


def _completions(config: Config, found: Found, judges: Judges, count: int, stage: Stage) -> None:
    assert found.model is not None and found.task is not None
    assert found.renderer is not None and found.placement is not None
    step, cursor = (found.resumed.step, found.resumed.cursor) if found.resumed else (0, 0)
    taken = sample_prompts(found.task, found.renderer, config.run.seed, cursor, count)
    stage.say(f"starting {config.actors.count} engine(s)")
    made = asyncio.run(generate(_prepared(config, found), taken.prompts, step))
    check_completions(config, made, judges, stage)


def _prepared(config: Config, found: Found) -> Prepared:
    """What training would have prepared; a run that goes on has its checkpoint's weights."""
    assert found.model is not None and found.task is not None
    assert found.renderer is not None and found.lengths is not None
    return Prepared(
        config=config,
        model_path=found.resumed.model_path if found.resumed else found.model.path,
        parameters=found.model.parameters,
        task=found.task,
        rewards=list(found.specs),
        renderer=found.renderer,
        max_length=found.lengths.max_length,
        overlong=found.lengths.overlong,
    )


def chosen(config: Config) -> str:
    """The keys that differ from their default, one line a section."""
    lines = []
    for section, values in config.model_dump().items():
        fields = SECTIONS[section].model_fields
        body = " ".join(
            f"{key}={value}"
            for key, value in values.items()
            if value != fields[key].get_default(call_default_factory=True)
        )
        if body:
            lines.append(f"{section:<9}  {body}")
    return "\n".join(lines)
