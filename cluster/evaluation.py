"""How well a policy does on held-out prompts: one greedy completion, and sampled ones, of each.

`cohort eval` and the evaluations during a run (`run.evaluate_every`) are the same code.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cohort.actors.pool import RolloutPool
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
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.metrics import episode_metrics
from cohort.cluster.observe.metrics_file import MetricRow
from cohort.cluster.observe.stats import mean
from cohort.cluster.prepare import Prepared
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

    def metrics(self) -> MetricRow:
        """What a step's row of metrics.jsonl gets of it."""
        return {
            "eval/greedy_reward": self.greedy_reward,
            "eval/greedy_solved": self.greedy_solved,
            "eval/sampled_reward": self.sampled_reward,
            **{f"eval/pass_at_{k}": value for k, value in self.pass_at.items()},
            "eval/failed_scores": self.failed_scores,
            **{f"eval/greedy/{name}": value for name, value in self.task_greedy.items()},
        }

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by: the mean greedy reward; NaN where none applies."""
        return self.greedy_reward


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


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run.

    Attributes:
        config: Of the run; the sampling is that of training.
        task: Whose rows they are.
        rows: Those that fit.
        prompts: Of these rows.
    """

    config: Config
    task: Task
    rows: list[Row]
    prompts: list[Prompt]

    @classmethod
    def of(cls, prepared: Prepared, console: Console) -> HeldOut:
        """The first `task.eval_prompts` held-out prompts of a run.

        Raises:
            RunError: There are none, or none fits.
            TaskError: One is too long, and task.overlong=error.
        """
        config, task = prepared.config, prepared.task
        count = min(config.task.eval_prompts, task.eval_size())
        if not count:
            raise RunError(f"task {config.task.name} has no held-out prompts")
        rows = [task.eval_row(index) for index in range(count)]
        rows, prompts = fitting_rows(prepared, rows, console)
        return cls(config, task, rows, prompts)

    async def score(self, pool: RolloutPool, rewards: RewardPool, name: str = "") -> Evaluation:
        """Generate and score, with the weights that the engines serve.

        Args:
            pool: The engines.
            rewards: The reward workers.
            name: Tells the groups of one evaluation from those of another that uses these engines.

        Raises:
            RunError: A group could not be generated or scored.
        """
        config, samples = self.config, self.config.task.group_size
        requests = [
            Request(
                f"{name}{kind}:{prompt.id}",
                prompt,
                SamplingSpec(
                    max_tokens=config.actors.max_tokens,
                    temperature=config.actors.temperature,
                    n=1 if kind == "greedy" else samples,
                    seed=derive_seed(config.run.seed, "eval", prompt.id),
                ),
                greedy=kind == "greedy",
            )
            for prompt in self.prompts
            for kind in ("greedy", "sampled")
        ]
        tasks = await pool.generate(requests)
        scored = await asyncio.gather(*(_score(rewards, task) for task in tasks))
        greedy, sampled = scored[0::2], scored[1::2]
        found = _report(config, [g.scores for g in greedy], [g.scores for g in sampled], samples)
        return replace(
            found,
            task_greedy=_more(self.task, self.rows, greedy),
            task_sampled=_more(self.task, self.rows, sampled),
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
