"""`cohort eval`: how well a model or a checkpoint does on the task's held-out prompts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cohort.actors.records import (
    Failure,
    Group,
    Prompt,
    Request,
    SamplingSpec,
    ScoreMeta,
    derive_seed,
)
from cohort.cluster.commands.train import connect_aside, shut_down
from cohort.cluster.config import Config
from cohort.cluster.making import make_pool, make_rewards
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import plan
from cohort.cluster.prepare import Prepared, RunError, passing_logs, prepare
from cohort.cluster.ray_start import check_start
from cohort.cluster.signals import Signals
from cohort.learner.checkpoint import latest
from cohort.rewards.base import error_tail
from cohort.rewards.tasks import Measures, Row, Task, TaskError


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out prompts. pass_at: k -> unbiased estimate from `samples` each.

    task_greedy, task_sampled: the task's own metrics, of greedy completions and of all samples;
    empty for a task without any.
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
    """Chance that at least one of k samples is right, without bias: 1 - C(n-c, k) / C(n, k).

    n samples, c of them solved. Chen et al. 2021 (arXiv 2107.03374), equation 1.
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
    """Generate and score held-out prompts: once greedily, and group_size samples each.

    model: a Hugging Face folder to use in place of model.path.

    Raises Stopped when a signal ends it.
    """
    with Signals() as signals:
        working = asyncio.ensure_future(_evaluate(config, model, console, signals))
        signals.then(working.cancel)
        try:
            return await working
        except asyncio.CancelledError:
            signals.check()
            raise


async def _evaluate(
    config: Config, model: Path | None, console: Console, signals: Signals
) -> Evaluation:
    import ray

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
    console.stage("starting Ray")
    placement = plan(config, await connect_aside(config, signals), prepared.parameters)
    with passing_logs("eval") as log_dir:
        pool = make_pool(prepared, placement, log_dir, console)
        rewards = make_rewards(prepared, placement, console)
        try:
            console.stage(f"starting {config.actors.count} engine(s)")
            await asyncio.gather(
                pool.start(config.cluster.start_timeout_s, serve_loaded=True),
                rewards.check(config.cluster.start_timeout_s),
            )
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
            tasks = await pool.generate(requests)
            judged = await asyncio.gather(*(_score(rewards, task) for task in tasks))
        finally:
            shut_down(pool, rewards, None)
            ray.shutdown()
    greedy, sampled = judged[0::2], judged[1::2]
    return replace(
        _report(config, [s for s, _ in greedy], [s for s, _ in sampled], samples),
        task_greedy=task_metrics(task, rows, [texts for _, texts in greedy]),
        task_sampled=task_metrics(task, rows, [texts for _, texts in sampled]),
    )


def fitting_rows(
    prepared: Prepared, rows: Sequence[Row], console: Console
) -> tuple[list[Row], list[Prompt]]:
    """The rows whose prompts leave room for a completion, with their prompts.

    Raises TaskError when one does not and task.overlong=error, RunError when none does.
    """
    limit = prepared.renderer.max_prompt_tokens
    pairs = [(row, prepared.renderer.render(row, 0)) for row in rows]
    kept = [(row, p) for row, p in pairs if limit is None or len(p.token_ids) <= limit]
    if len(kept) < len(pairs):
        told = f"{len(pairs) - len(kept)} of {len(pairs)} held-out prompts are longer than {limit}"
        if prepared.config.task.overlong == "error":
            raise TaskError(f"{told} tokens: raise model.max_length, or set task.overlong=drop")
        if not kept:
            raise RunError(f"{told} tokens: raise model.max_length")
        console.note(f"{told} tokens and left out")
    return [row for row, _ in kept], [prompt for _, prompt in kept]


def task_metrics(
    task: Task, rows: Sequence[Row], texts: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The task's own metrics over all completions of each row; empty when it has none.

    Raises RunError with the task's traceback when it fails.
    """
    if not isinstance(task, Measures):
        return {}
    repeated = [row for row, several in zip(rows, texts, strict=True) for _ in several]
    flat = [text for several in texts for text in several]
    try:
        return task.metrics(repeated, flat)
    except Exception as error:
        raise RunError(f"{type(task).__name__}.metrics failed:\n{error_tail(error)}") from error


async def _score(rewards: Any, generating: Any) -> tuple[ScoreMeta, list[str]]:
    meta, group = await generating
    if isinstance(meta, Failure):
        raise RunError(str(meta))
    scores, _ = await rewards.score(group)
    if isinstance(scores, Failure):
        raise RunError(str(scores))
    completions: Group = await group
    return scores, [completion.text for completion in completions.completions]


def _report(
    config: Config, greedy: list[ScoreMeta], sampled: list[ScoreMeta], samples: int
) -> Evaluation:
    bar = config.task.solved_at
    # A score that failed counts as unsolved and is reported; None that means "does not apply" is
    # left out of the mean reward.
    greedy_totals = [item.totals[0] for item in greedy]
    sampled_totals = [total for item in sampled for total in item.totals]
    solved = [sum(t is not None and t >= bar for t in item.totals) for item in sampled]
    ks = sorted({1, *(k for k in (2, 4, 8, 16, 32, 64) if k <= samples), samples})
    return Evaluation(
        model=config.model.path,
        prompts=len(greedy),
        samples=samples,
        greedy_reward=_mean([t for t in greedy_totals if t is not None]),
        greedy_solved=_mean([float(t is not None and t >= bar) for t in greedy_totals]),
        sampled_reward=_mean([t for t in sampled_totals if t is not None]),
        pass_at={k: _mean([pass_at_k(samples, c, k) for c in solved]) for k in ks},
        failed_scores=sum(len(item.errors) for item in (*greedy, *sampled)),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
