"""`cohort eval`: how well a model or a checkpoint does on the task's held-out prompts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.actors.records import (
    Failure,
    Group,
    GroupMeta,
    Prompt,
    Request,
    SamplingSpec,
    ScoreMeta,
    derive_seed,
)
from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.launch import launch
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import episode_metrics
from cohort.cluster.observe.stats import mean
from cohort.cluster.prepare import Prepared, passing_logs, prepare
from cohort.cluster.ray_start import check_start
from cohort.cluster.signals import Signals
from cohort.learner.checkpoint import latest
from cohort.rewards.base import error_tail
from cohort.rewards.pool import RewardPool
from cohort.rewards.tasks import Measures, Row, Task, TaskError

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out prompts.

    Attributes:
        model: Folder or hub id.
        prompts: How many there were.
        samples: Completions sampled for each prompt, besides the greedy one.
        greedy_reward: Mean reward of greedy completions; NaN where none applies.
        greedy_solved: Fraction of greedy completions with a reward of at least task.solved_at.
        sampled_reward: Mean reward of sampled completions.
        pass_at: k -> unbiased estimate of pass@k.
        failed_scores: Scores that failed, which count as unsolved.
        task_greedy: The task's own metrics of greedy completions, and those of episodes.
        task_sampled: The same of sampled completions.
    """

    model: str
    prompts: int
    samples: int
    greedy_reward: float
    greedy_solved: float
    sampled_reward: float
    pass_at: dict[int, float]
    failed_scores: int
    task_greedy: dict[str, float] = field(default_factory=dict)
    task_sampled: dict[str, float] = field(default_factory=dict)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that one of k completions is solved, unbiased: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Args:
        samples: Completions of the prompt, n.
        solved: How many of them are solved, c.
        k: How many may be tried.
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def checkpoint_model(run_dir: Path) -> Path:
    """The Hugging Face folder inside a run's last complete checkpoint."""
    checkpoint = latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{run_dir} holds no complete checkpoint")
    return checkpoint / "hf"


async def evaluate(config: Config, model: Path | None, console: Console) -> Evaluation:
    """Generate and score held-out prompts: one greedy completion and group_size sampled ones each.

    Args:
        config: Names the task, the rewards and the sampling.
        model: A Hugging Face folder to use instead of model.path.
        console: Shows progress.

    Raises:
        Stopped: A signal ended it.
        CohortError: It cannot start, or generating or scoring failed.
    """
    with Signals() as signals:
        return await signals.cancel(_evaluate(config, model, console, signals))


async def _evaluate(
    config: Config, model: Path | None, console: Console, signals: Signals
) -> Evaluation:
    if model is not None:
        changed = config.model.model_copy(update={"path": str(model)})
        config = config.model_copy(update={"model": changed})
    prepared = prepare(config)
    task = prepared.task
    count = min(config.task.eval_prompts, task.eval_size())
    if not count:
        raise RunError(f"task {config.task.name} has no held-out prompts")
    rows = [task.eval_row(index) for index in range(count)]
    rows, prompts = fitting_rows(prepared, rows, console)
    count = len(rows)
    samples = config.task.group_size
    check_start(config)
    with passing_logs("eval") as log_dir:
        async with launch(
            prepared, console, log_dir, ("engines", "rewards"), signals=signals
        ) as actors:
            console.stage(f"{count} held-out prompts, greedy and {samples} samples each")
            requests = [
                Request(
                    f"{kind}:{prompt.id}",
                    prompt,
                    SamplingSpec(
                        max_tokens=config.actors.max_tokens,
                        temperature=config.actors.temperature,
                        n=1 if kind == "greedy" else samples,
                        seed=derive_seed(config.run.seed, "eval", prompt.id),
                    ),
                    greedy=kind == "greedy",
                )
                for prompt in prompts
                for kind in ("greedy", "sampled")
            ]
            tasks = await actors.pool.generate(requests)
            scored = await asyncio.gather(*(_score(actors.rewards, task) for task in tasks))
    greedy, sampled = scored[0::2], scored[1::2]
    return replace(
        _report(config, [one.scores for one in greedy], [one.scores for one in sampled], samples),
        task_greedy=_more(task, rows, greedy),
        task_sampled=_more(task, rows, sampled),
    )


def _more(task: Task, rows: Sequence[Row], scored: Sequence[_Scored]) -> dict[str, float]:
    """The task's own metrics, and those of episodes."""
    own = task_metrics(task, rows, [one.texts for one in scored])
    return own | episode_metrics([one.meta for one in scored])


def fitting_rows(
    prepared: Prepared, rows: Sequence[Row], console: Console
) -> tuple[list[Row], list[Prompt]]:
    """The rows whose prompts leave room for a completion, and these prompts.

    Raises:
        TaskError: One does not, and task.overlong=error.
        RunError: None does.
    """
    limit = prepared.renderer.max_prompt_tokens
    pairs = [(row, prepared.renderer.render(row, 0)) for row in rows]
    kept = [(row, p) for row, p in pairs if limit is None or len(p.token_ids) <= limit]
    if len(kept) < len(pairs):
        message = (
            f"{len(pairs) - len(kept)} of {len(pairs)} held-out prompts are longer than {limit}"
        )
        if prepared.config.task.overlong == "error":
            raise TaskError(f"{message} tokens: raise model.max_length, or set task.overlong=drop")
        if not kept:
            raise RunError(f"{message} tokens: raise model.max_length")
        console.note(f"{message} tokens and left out")
    return [row for row, _ in kept], [prompt for _, prompt in kept]


def task_metrics(
    task: Task, rows: Sequence[Row], texts: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The task's own metrics over all completions of each row; empty when it has none.

    Args:
        task: The task.
        rows: One for each prompt.
        texts: Completions of each row.

    Raises:
        RunError: The task's code failed; the message has its traceback.
    """
    if not isinstance(task, Measures):
        return {}
    repeated = [row for row, several in zip(rows, texts, strict=True) for _ in several]
    flat = [text for several in texts for text in several]
    try:
        return task.metrics(repeated, flat)
    except Exception as error:
        raise RunError(f"{type(task).__name__}.metrics failed:\n{error_tail(error)}") from error


@dataclass(frozen=True)
class _Scored:
    """A group that was generated and scored, with the texts of its completions."""

    meta: GroupMeta
    scores: ScoreMeta
    texts: list[str]


async def _score(
    rewards: RewardPool, generating: Awaitable[tuple[GroupMeta | Failure, ObjectRef[Group] | None]]
) -> _Scored:
    meta, group = await generating
    if isinstance(meta, Failure) or group is None:
        raise RunError(str(meta))
    scores, _ = await rewards.score(group)
    if isinstance(scores, Failure):
        raise RunError(str(scores))
    texts = [completion.text for completion in (await group).completions]
    return _Scored(meta, scores, texts)


def _report(
    config: Config, greedy: list[ScoreMeta], sampled: list[ScoreMeta], samples: int
) -> Evaluation:
    bar = config.task.solved_at
    # A failed score counts as unsolved and is reported; None, "does not apply", is left out of the
    # mean reward.
    greedy_totals = [item.totals[0] for item in greedy]
    sampled_totals = [total for item in sampled for total in item.totals]
    solved = [sum(t is not None and t >= bar for t in item.totals) for item in sampled]
    ks = sorted({1, *(k for k in (2, 4, 8, 16, 32, 64) if k <= samples), samples})
    return Evaluation(
        model=config.model.path,
        prompts=len(greedy),
        samples=samples,
        greedy_reward=mean(greedy_totals),
        greedy_solved=mean(t is not None and t >= bar for t in greedy_totals),
        sampled_reward=mean(sampled_totals),
        pass_at={k: mean(pass_at_k(samples, c, k) for c in solved) for k in ks},
        failed_scores=sum(len(item.errors) for item in (*greedy, *sampled)),
    )
