"""The stage with an engine: completions of the run's first prompts, generated and scored."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cohort.actors.records import Failure, Group, GroupMeta, Prompt, ScoreMeta
from cohort.cluster.commands.check.estimate import (
    expected_equal,
    histogram_lines,
    two_valued,
    wilson,
)
from cohort.cluster.commands.check.prompts import bounded
from cohort.cluster.commands.check.rewards import CheckedGroup, Scorers, report_errors
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.cluster.launch import launch
from cohort.cluster.observe.console import Console, number
from cohort.cluster.observe.stats import mean, quantile
from cohort.cluster.prepare import Prepared, RunError, passing_logs
from cohort.cluster.requests import group_request
from cohort.learner.credit import informative

SHOWN_GROUPS = 2
SHOWN_COMPLETIONS = 4
LONGEST_TEXT = 300


@dataclass(frozen=True)
class Generated:
    """What the engines generated: the groups, the seconds for all of them, and of the start."""

    metas: list[GroupMeta]
    groups: list[Group]
    seconds: float
    start_s: float

    @property
    def lengths(self) -> list[int]:
        return [tokens for meta in self.metas for tokens in meta.completion_tokens]


async def generate(prepared: Prepared, prompts: Sequence[Prompt], step: int) -> Generated:
    """Start the engines, generate a group for each prompt as step `step` would, end the engines.

    Raises:
        RolloutError: An engine does not start.
        RunError: A group could not be generated.
    """
    config = prepared.config
    with passing_logs("check") as log_dir, Console(1, "plain") as console:
        async with launch(prepared, console, log_dir, ("engines",)) as actors:
            began = time.monotonic()
            requests = [group_request(config, step, prompt) for prompt in prompts]
            made = await asyncio.gather(*await actors.pool.generate(requests))
            seconds = time.monotonic() - began
            metas, groups = [], []
            for meta, reference in made:
                if isinstance(meta, Failure):
                    raise RunError(str(meta))
                assert reference is not None
                metas.append(meta)
                groups.append(await reference)
    return Generated(metas, groups, seconds, actors.engine_start_s)


def check_completions(config: Config, generated: Generated, scorers: Scorers, stage: Stage) -> None:
    """Score what was generated; show some, lengths, rewards, times, groups without signal."""
    tokens = sum(generated.lengths)
    stage.say(
        f"{len(generated.groups)} prompts x {config.task.group_size} completions: {tokens:,} "
        f"tokens in {generated.seconds:.1f} s ({tokens / generated.seconds:.0f} a second); engines "
        f"started in {generated.start_s:.1f} s"
    )
    scored = [scorers.score(group) for group in generated.groups]
    # Where rewards differ most, a person sees best what they reward.
    pairs = sorted(zip(generated.groups, scored, strict=True), key=_different, reverse=True)
    for group, item in pairs[:SHOWN_GROUPS]:
        _show(group, item, stage)
    _check_lengths(config, generated, stage)
    scores = [
        replace(item.scores, group_id=meta.group_id)
        for item, meta in zip(scored, generated.metas, strict=True)
    ]
    report_errors(config, scores, stage)
    _functions(scorers, scored, stage)
    _check_totals(config, scores, stage)
    _check_signal(config, generated.metas, scores, stage)
    _check_times(config, generated, scored, stage)


def _different(pair: tuple[Group, CheckedGroup]) -> float:
    """The standard deviation of a group's rewards."""
    known = [total for total in pair[1].scores.totals if total is not None]
    return statistics.pstdev(known) if known else 0.0


def _show(group: Group, scored: CheckedGroup, stage: Stage) -> None:
    """Some completions of a group, the best first and the worst last."""
    totals = scored.scores.totals

    def rank(place: int) -> float:
        total = totals[place]
        return -math.inf if total is None else -total

    order = sorted(range(len(totals)), key=rank)
    if len(order) > SHOWN_COMPLETIONS:
        order = order[: SHOWN_COMPLETIONS // 2] + order[-(SHOWN_COMPLETIONS // 2) :]
    stage.say(f"row {group.prompt.id}: {len(order)} of {len(totals)} completions")
    for place in order:
        completion = group.completions[place]
        truncated = " (truncated)" if completion.finish_reason == "length" else ""
        text = bounded(repr(completion.text), LONGEST_TEXT)
        by_function = scored.scores.by_function
        parts = ", ".join(f"{name} {number(values[place])}" for name, values in by_function.items())
        if len(by_function) > 1:
            text = f"({parts})  {text}"
        stage.say(
            f"  reward {number(totals[place]):>5}  {len(completion.token_ids):>5} tokens{truncated}"
            f"  {text}"
        )
        if completion.end is not None:
            for message in completion.end.messages:
                stage.say(f"    [{message['role']}] {bounded(str(message['content']), 200)}")
            stage.say(f"    [end] {completion.end.stop_reason}")


def _check_lengths(config: Config, generated: Generated, stage: Stage) -> None:
    lengths = generated.lengths
    truncated = mean(flag for meta in generated.metas for flag in meta.truncated)
    stage.say(
        f"length of completions, tokens: median {quantile(lengths, 0.5)}, 95 % up to "
        f"{quantile(lengths, 0.95)}; {truncated:.0%} truncated at "
        f"actors.max_tokens={config.actors.max_tokens}"
    )
    stage.say("\n".join(f"  {line}" for line in histogram_lines(lengths)))
    if truncated > 0.5:
        stage.warn(
            f"{truncated:.0%} of the completions are truncated before they end: raise "
            "actors.max_tokens, or ask for shorter answers in the prompt"
        )
    elif truncated > 0.1:
        stage.say(
            f"note: {truncated:.0%} truncated; watch rollout/truncated_fraction, see "
            "actors.max_tokens"
        )


def _functions(scorers: Scorers, scored: Sequence[CheckedGroup], stage: Stage) -> None:
    """Each function by itself: what it gave, and how long it took."""
    completions = sum(len(item.scores.totals) for item in scored)
    width = max((len(spec.name) for spec in scorers.specs), default=0)
    stage.say(f"rewards of the {completions} completions:")
    for spec in scorers.specs:
        values = [value for item in scored for value in item.scores.by_function[spec.name]]
        known = [value for value in values if value is not None]
        took = sum(item.seconds[spec.name] for item in scored)
        span = f"{min(known):.2f} to {max(known):.2f}" if known else "no value"
        none = f", None for {len(values) - len(known)}" if len(known) < len(values) else ""
        stage.say(
            f"  {spec.name:<{width}}  mean {number(mean(values))}, {span}{none}; "
            f"{1000 * took / completions:.1f} ms each"
        )
    parts: dict[str, list[float | None]] = {}
    for item in scored:
        for name, row in item.scores.parts.items():
            parts.setdefault(name, []).extend(row)
    for name, numbers in parts.items():
        stage.say(f"  part {name}: mean {number(mean(numbers))}")


def _check_totals(config: Config, scores: Sequence[ScoreMeta], stage: Stage) -> None:
    totals = [total for meta in scores for total in meta.totals]
    known = [total for total in totals if total is not None]
    if not known:
        stage.problem(
            "no completion has a reward: nothing can be learned. Each needs at least one function "
            "of rewards.functions that gives it a value and none that fails"
        )
        return
    bar = config.task.solved_at
    solved = sum(total >= bar for total in known) / len(known)
    stage.say(
        f"total reward: mean {number(mean(totals))}; solved (at least task.solved_at={bar:g}): "
        f"{solved:.0%}"
    )
    if len(set(known)) > 1:
        return
    if known[0] >= bar:
        stage.warn(
            "every completion is solved: there is nothing left to learn here; choose a harder task "
            "(task.options, task.data)"
        )
    else:
        stage.warn(
            f"every completion earned {known[0]:g}: a run learns from differences only. Choose an "
            "easier task (task.options, task.data), teach the form of the answer first (`cohort "
            "warmup`), or add a function that rewards part of the way"
        )


def _check_signal(
    config: Config, metas: Sequence[GroupMeta], scores: Sequence[ScoreMeta], stage: Stage
) -> None:
    """The fraction of groups whose rewards are all equal: they teach nothing."""
    flat = sum(
        not informative(meta, score, config.algorithm)
        for meta, score in zip(metas, scores, strict=True)
    )
    low, high = wilson(flat, len(metas))
    stage.say(
        f"groups without signal (all rewards equal): {flat} of {len(metas)}, so in the run's first "
        f"steps {low:.0%} to {high:.0%} (Wilson, 95 %)"
    )
    size = config.task.group_size
    passed = two_valued([meta.totals for meta in scores])
    wider = ""
    if passed is not None:
        expected = expected_equal(passed, size)
        doubled = expected_equal(passed, 2 * size)
        stage.say(
            f"  from the prompts' pass rates (Beta-binomial): {expected:.0%} expected, "
            f"{doubled:.0%} with task.group_size={2 * size}"
        )
        if doubled < expected - 0.05:
            wider = (
                f", or raise task.group_size (see above), at most {config.actors.max_concurrent}"
            )
    if flat > 0.5 * len(metas) and len({total for meta in scores for total in meta.totals}) > 1:
        stage.warn(
            f"{flat / len(metas):.0%} of the groups carry no signal, and their generation is "
            f"wasted: choose a task that is solved between 10 and 80 % of the time{wider}; "
            "algorithm.dynamic_sampling_rounds samples new prompts in their place"
        )


def _check_times(
    config: Config, generated: Generated, scored: Sequence[CheckedGroup], stage: Stage
) -> None:
    """Seconds of a step, where they were measured."""
    prompts, workers = config.task.prompts_per_step, config.rewards.workers
    scale = prompts / len(generated.groups)
    generating = generated.seconds * scale
    scoring = sum(item.scores.seconds for item in scored) * scale / workers
    how = "" if scale == 1 else f", scaled from {len(generated.groups)} prompts"
    stage.say(
        f"a step of {prompts} prompts: generation about {generating:.1f} s, rewards about "
        f"{scoring:.1f} s on {workers} worker(s){how} (first calls are the slowest; the learner's "
        "part is not measured here)"
    )
    if scoring > generating:
        wanted = math.ceil(scoring * workers / generating)
        stage.warn(
            f"rewards take longer than generation: rewards.workers={wanted} would keep up, where "
            "there are cores for them"
        )
