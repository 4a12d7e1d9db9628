"""The stages of the task: its rows, its prompts as the model reads them, their lengths."""

from __future__ import annotations

from collections.abc import Sequence

from cohort.actors.records import Prompt
from cohort.cluster.commands.check.estimate import histogram_lines
from cohort.cluster.commands.check.model import Model
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.cluster.lengths import check_lengths, render_rows
from cohort.cluster.observe.stats import quantile
from cohort.cluster.prepare import Prepared, longest_prompt, make_renderer
from cohort.rewards.specs import RewardSpec, reward_specs
from cohort.rewards.tasks import Task, load_task, sample_rows

SHOWN_PROMPTS = 2
LONGEST_SHOWN = 6000
LONGEST_COLUMN = 120


def check_task(config: Config, stage: Stage) -> tuple[Task, list[RewardSpec]]:
    """The task's rows and the functions that will score them, not loaded yet."""
    task = load_task(config.task, config.run.seed)
    specs = reward_specs(task, config.rewards, environment=config.task.environment is not None)
    rows, need = task.train_size(), config.run.steps * config.task.prompts_per_step
    stage.say(
        f"{config.task.name}: {rows:,} training rows, {task.eval_size():,} held out; "
        f"{config.run.steps:,} steps of {config.task.prompts_per_step} prompts see each row "
        f"{need / rows:.1f} times"
    )
    scores = [f"{spec.name} x {spec.weight:g}" for spec in specs]
    if config.task.environment is not None:
        scores.append(f"what {config.task.environment} gives")
    stage.say("rewards: " + ", ".join(scores))
    return task, specs


def check_prompts(
    config: Config, model: Model, task: Task, specs: Sequence[RewardSpec], stage: Stage
) -> tuple[Prepared, list[Prompt]]:
    """Show the first two prompts of the run, and the lengths against the limits.

    Returns:
        What training would prepare, and the training prompts that were rendered.
    """
    renderer = make_renderer(config, model.tokenizer, model.context)
    limit = longest_prompt(config, model.context)
    rendered = render_rows(task, renderer)
    for number, (epoch, row) in enumerate(sample_rows(task, config.run.seed, 0, SHOWN_PROMPTS), 1):
        _show(number, renderer.render(row, epoch), stage)
    lengths = [len(prompt.token_ids) for prompt in rendered.prompts]
    which = (
        f"all {rendered.rows:,} prompts"
        if rendered.whole
        else f"{len(lengths):,} of {rendered.rows:,} prompts, the longest among them"
    )
    stage.say(
        f"length of {which}, tokens: median {quantile(lengths, 0.5)}, "
        f"95 % up to {quantile(lengths, 0.95)}, longest {max(lengths)}"
    )
    stage.say("\n".join(f"  {line}" for line in histogram_lines(lengths)))
    bound = "model.max_length" if config.model.max_length else "the model's context"
    stage.say(
        f"limit: {limit:,} = {bound} {limit + config.actors.max_tokens:,} - actors.max_tokens "
        f"{config.actors.max_tokens:,}"
    )
    found = check_lengths(config, rendered, renderer, specs)
    if found.overlong:
        stage.warn(
            f"{found.overlong} of {len(lengths)} prompts are too long and left out: raise "
            "model.max_length or lower actors.max_tokens to keep them"
        )
    if rendered.whole:
        _check_leakage(rendered.train, rendered.held_out, stage)
    else:
        stage.say(
            f"the others are rendered when they are sampled: the run has room for "
            f"{found.longest:,} tokens"
        )
    ready = Prepared(
        config, model.path, model.parameters, task, list(specs), renderer, found,
        trained=model.trained,
    )  # fmt: skip
    return ready, rendered.train


def _check_leakage(train: list[Prompt], held_out: list[Prompt], stage: Stage) -> None:
    different = {prompt.token_ids for prompt in train}
    leaked = sum(prompt.token_ids in different for prompt in held_out)
    if len(different) < len(train):
        stage.say(f"{len(different):,} of the {len(train):,} training prompts are different")
    if leaked:
        stage.warn(
            f"{leaked} of {len(held_out)} held-out prompts are also trained on, so `cohort eval` "
            "would flatter the model: take them out of the training rows"
        )


def _show(number: int, prompt: Prompt, stage: Stage) -> None:
    stage.say(f"prompt {number}, row {prompt.id}, {len(prompt.token_ids)} tokens:")
    stage.say("\n".join(f"  | {line}" for line in bounded(prompt.text or "").split("\n")))
    columns = ", ".join(
        f"{name}={bounded(repr(value), LONGEST_COLUMN)}" for name, value in prompt.columns.items()
    )
    stage.say(f"  columns for the rewards: {columns or 'none'}")


def bounded(text: str, longest: int = LONGEST_SHOWN) -> str:
    """The text, without its middle when it is too long."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
