"""The stage of the rewards: every function on real rows, in the child processes that a run uses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cohort.actors.records import Completion, Failure, Group, Prompt, ScoreMeta
from cohort.actors.text import completion_text
from cohort.actors.turns import ENVIRONMENT
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.observe.console import number
from cohort.cluster.observe.stats import mean
from cohort.rewards.base import combine
from cohort.rewards.environments.scores import environment_scores
from cohort.rewards.extract import left_open
from cohort.rewards.specs import RewardSpec
from cohort.rewards.tasks import Demonstrates, Task
from cohort.rewards.worker import RewardWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 4
# Columns that hold a reference answer by the field's conventions, and ways of giving an answer.
REFERENCE_COLUMNS = ("answer", "solution", "ground_truth", "target")
FORMS = {
    "{name}": "{text}",
    "{name} in \\boxed": "\\boxed{{{text}}}",
    "{name} in <answer>": "<answer>{text}</answer>",
}
SHOWN, ECHO, NOTHING = "a demonstration", "the prompt again", "nothing"


@dataclass(frozen=True)
class CheckedGroup:
    """The scores of one group, and the seconds that each function took for all of it."""

    scores: ScoreMeta
    seconds: dict[str, float]


class Scorers:
    """Every reward function in a child process of its own, so that each is timed by itself.

    To be used and closed in the thread that made it.

    Attributes:
        specs: The functions.
        load_s: The seconds that loading each one took.

    Raises:
        RewardLoadError: A function cannot be loaded.
    """

    def __init__(self, config: Config, specs: Sequence[RewardSpec]) -> None:
        limits = config.rewards
        self.specs = tuple(specs)
        self.load_s: dict[str, float] = {}
        self._workers: dict[str, RewardWorker] = {}
        try:
            for spec in specs:
                began = time.monotonic()
                self._workers[spec.name] = RewardWorker(
                    [spec],
                    limits.timeout_s,
                    memory_bytes=limits.memory_bytes,
                    max_steps=config.run.steps,
                )
                self.load_s[spec.name] = time.monotonic() - began
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child processes."""
        for worker in self._workers.values():
            worker.close()

    def score(self, group: Group) -> CheckedGroup:
        """Score a group.

        Raises:
            RunError: A child process cannot be started.
        """
        metas: dict[str, ScoreMeta] = {}
        for name, worker in self._workers.items():
            meta, _ = worker.score(group)
            if isinstance(meta, Failure):
                raise RunError(str(meta))
            metas[name] = meta
        by_function = {name: meta.by_function[name] for name, meta in metas.items()}
        # Each worker says what the environment gave as well.
        errors = tuple(
            error
            for meta in metas.values()
            for error in meta.errors
            if error.function != ENVIRONMENT
        )
        weights = {spec.name: spec.weight for spec in self.specs}
        given, failures = environment_scores(group)
        if given:
            by_function[ENVIRONMENT], weights[ENVIRONMENT] = given, 1.0
            errors += failures
        ids = [completion.id for completion in group.completions]
        totals = combine(ids, by_function, weights, errors)
        seconds = {name: meta.seconds for name, meta in metas.items()}
        parts = {key: row for meta in metas.values() for key, row in meta.parts.items()}
        took = sum(seconds.values())
        return CheckedGroup(ScoreMeta(group.id, totals, by_function, errors, took, parts), seconds)

    def comparing(self, group: Group, scored: CheckedGroup) -> list[str]:
        """Functions that a run calls as completions come, although they score a completion alone
        differently than in its group."""
        failed = {error.function for error in scored.scores.errors}
        found = []
        for spec in self.specs:
            (streams,) = self._workers[spec.name].streams
            if not streams or spec.name in failed:
                continue
            alone: list[float | None] = []
            for completion in group.completions:
                part = replace(group, completions=(completion,))
                _, found_alone = self._workers[spec.name].score_part(part)
                alone.extend(found_alone.results[spec.name][0].values if found_alone else ())
            if tuple(alone) != scored.scores.by_function[spec.name]:
                found.append(spec.name)
        return found


def demonstrations(task: Task) -> list[str | None]:
    """The task's demonstrations for its first rows; all None unless each of these has one text."""
    first = range(min(ROWS, task.train_size()))
    if not isinstance(task, Demonstrates):
        return [None for _ in first]
    shown = [task.demonstration(task.train_row(index), 0) for index in first]
    texts: list[str | None] = [text for text in shown if isinstance(text, str)]
    return texts if len(texts) == len(shown) else [None for _ in first]


def check_rewards(
    config: Config,
    scorers: Scorers,
    task: Task,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
) -> None:
    """Score made-up completions of the first rows: the reference answer, a demonstration, the
    prompt again, nothing."""
    if not scorers.specs:
        stage.say("no reward functions: all rewards are the environment's")
        return
    if config.task.environment is not None:
        stage.say("not tried on made-up completions: these are no episodes of the environment")
        return
    pairs = zip(prompts[:ROWS], demonstrations(task), strict=True)
    groups = [made_up(prompt, text, tokenizer) for prompt, text in pairs]
    scored = [scorers.score(group) for group in groups]
    kinds = [completion.id for completion in groups[0].completions]
    names = [spec.name for spec in scorers.specs]
    width = max(len(kind) for kind in kinds)
    columns = [max(len(name), 9) for name in (*names, "total")]
    stage.say(
        f"mean scores of made-up completions over {len(groups)} rows"
        f"\n  {'':<{width}}  {_row((*names, 'total'), columns)}"
    )
    totals: dict[str, float] = {}
    for place, kind in enumerate(kinds):
        cells = [mean(item.scores.by_function[name][place] for item in scored) for name in names]
        totals[kind] = mean(item.scores.totals[place] for item in scored)
        row = [number(value) for value in (*cells, totals[kind])]
        stage.say(f"  {kind:<{width}}  {_row(row, columns)}")
    each = len(kinds) * len(groups)
    times = [f"{1000 * sum(item.seconds[n] for item in scored) / each:.1f} ms" for n in names]
    stage.say(f"  {'each takes':<{width}}  {_row((*times, ''), columns)}")
    loading = [f"{scorers.load_s[name]:.1f} s" for name in names]
    stage.say(f"  {'loading takes':<{width}}  {_row((*loading, ''), columns)}")
    report_errors(config, [item.scores for item in scored], stage, blank=NOTHING)
    for name in scorers.comparing(groups[0], scored[0]):
        stage.warn(
            f"{name} gives completions other values one by one than together, and a run scores "
            "them as they come: if it compares them, set whole_group: true on it in "
            "rewards.functions, or take per_completion from it"
        )
    if not any(item.scores.errors for item in scored):
        _compare(config, totals, stage)


def made_up(prompt: Prompt, demonstration: str | None, tokenizer: PreTrainedTokenizerBase) -> Group:
    """A group of completions that no model generated; their ids say what they are."""
    last = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
    texts: dict[str, str] = {}
    for name in REFERENCE_COLUMNS:
        if name in prompt.columns and isinstance(prompt.columns[name], str | int | float):
            text = str(prompt.columns[name])
            # Where the prompt opens the thinking, an answer comes after it.
            closing = left_open(prompt.prefill)
            thought = f"So{closing}\n" if closing else ""
            texts = {
                kind.format(name=name): thought + form.format(text=text)
                for kind, form in FORMS.items()
            }
            break
    if demonstration is not None:
        texts[SHOWN] = demonstration.removeprefix(prompt.prefill)
    texts |= {ECHO: last, NOTHING: ""}
    return Group(
        prompt.id,
        prompt,
        tuple(_completion(kind, prompt, text, tokenizer) for kind, text in texts.items()),
    )


def _completion(
    kind: str, prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase
) -> Completion:
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(
        id=kind,
        prompt_id=prompt.id,
        token_ids=np.asarray(token_ids, dtype=np.int64),
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason="stop",
        seed=0,
        weight_versions=(0, 0),
        # As in a run: what rewards read has been through the tokenizer.
        text=completion_text(tokenizer, token_ids),
    )


def _compare(config: Config, totals: dict[str, float], stage: Stage) -> None:
    """Whether the totals of made-up completions make sense."""
    known = {kind: total for kind, total in totals.items() if not math.isnan(total)}
    if not known:
        stage.warn(
            "no function gave a value for any of these: see below whether they score what the "
            "model writes"
        )
        return
    for kind in (ECHO, NOTHING):
        if known.get(kind, -math.inf) >= config.task.solved_at:
            stage.warn(
                f"a completion that is {kind} counts as solved (task.solved_at="
                f"{config.task.solved_at:g}): the model would learn just that"
            )
    answers = {kind: total for kind, total in known.items() if kind not in (ECHO, NOTHING)}
    cheap = max((known[kind] for kind in (ECHO, NOTHING) if kind in known), default=-math.inf)
    if answers and max(answers.values()) <= cheap:
        stage.warn(
            "the row's own answer, in each of the forms above, earns no more than an empty "
            "completion or a copy of the prompt: check that the functions read the right column "
            "(columns: of rewards.functions), and which form of answer they want"
        )


def report_errors(
    config: Config, scores: Sequence[ScoreMeta], stage: Stage, blank: str | None = None
) -> None:
    """Report reward functions that failed: a problem where the run would stop for it.

    Args:
        config: The config, for rewards.max_error_rate.
        scores: Those of all groups.
        stage: Where to report.
        blank: The completion that does not count, because a model seldom writes nothing.
    """
    for name in dict.fromkeys(error.function for meta in scores for error in meta.errors):
        errors = [error for meta in scores for error in meta.errors if error.function == name]
        scored = sum(len(meta.totals) for meta in scores)
        counted = [error for error in errors if error.completion_id != blank]
        fraction = len(counted) / (scored - (len(scores) if blank else 0))
        first = (counted or errors)[0]
        message = (
            f"{name} failed ({first.cause}) on {len(errors)} of {scored} completions; the first, "
            f"{first.completion_id}:\n{first.message}"
        )
        if fraction > config.rewards.max_error_rate:
            stage.problem(
                message + f"\nA run stops above rewards.max_error_rate="
                f"{config.rewards.max_error_rate:g}"
            )
        else:
            stage.warn(message)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
