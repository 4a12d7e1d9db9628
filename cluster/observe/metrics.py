"""From what happened in a step to the numbers that describe it. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import pstdev

from cohort.actors.records import GroupMeta
from cohort.cluster.observe.metrics_file import MetricRow
from cohort.cluster.observe.stats import mean, quantile
from cohort.cluster.stream import Batch
from cohort.learner.credit import zero_variance
from cohort.learner.learner import StepResult


@dataclass
class Counters:
    """Completions over the whole run: each that was admitted is trained, filtered or failed.

    Attributes:
        group_size: Completions of a group, for groups that were lost as a whole.
        before: Completions that the runs accounted for which this one continues.
    """

    admitted: int = 0
    trained: int = 0
    filtered: int = 0
    failed: int = 0
    skipped_steps: int = 0
    group_size: int = 0
    before: int = 0

    def add(self, batch: Batch, result: StepResult) -> None:
        """Account for every completion of a step."""
        self.trained += result.trained
        self.filtered += result.filtered
        lost = len(batch.failures) * self.group_size
        self.failed += result.failed + lost
        self.admitted += result.trained + result.filtered + result.failed + lost
        self.skipped_steps += not result.applied and result.trained > 0

    def check(self, admitted_now: int, in_flight: int) -> None:
        """Check that nothing was lost: admitted = accounted for + in flight.

        Args:
            admitted_now: Completions admitted since this process started.
            in_flight: Those of them that are still being generated or scored.

        Raises:
            AssertionError: They do not add up.
        """
        accounted = self.trained + self.filtered + self.failed - self.before
        if admitted_now != accounted + in_flight:
            raise AssertionError(
                f"samples do not add up: {admitted_now} admitted, {accounted} accounted for, "
                f"{in_flight} in flight"
            )

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def resumed(cls, saved: dict[str, int], group_size: int | None = None) -> Counters:
        """Counters that continue a checkpoint's, with this group size from now on."""
        counters = cls(**saved)
        if group_size is not None:
            counters.group_size = group_size
        counters.before = counters.trained + counters.filtered + counters.failed
        return counters


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step; time outside the named phases is waiting and bookkeeping."""

    step: float
    generate: float
    reward: float
    train: float
    sync: float

    @classmethod
    def of(
        cls, batch: Batch, train_s: float, sync_s: float = 0.0, step_s: float | None = None
    ) -> StepTimes:
        """The times of the step that trained `batch`; without a whole, the sum of its parts."""
        parts = (batch.generate_s, batch.reward_s, train_s, sync_s)
        return cls(sum(parts) if step_s is None else step_s, *parts)

    @property
    def wait(self) -> float:
        return max(0.0, self.step - self.generate - self.reward - self.train - self.sync)


def reward_errors(batch: Batch) -> tuple[float, str]:
    """The failed fraction of a step, which `rewards.max_error_rate` bounds, and the first failure.

    Failed are completions that were lost (not generated) or could not be scored, among those that
    were admitted for the step. A group that failed as a whole counts with all its completions.
    """
    sizes = [len(group.scores.totals) for group in batch.groups]
    failed, admitted, reasons = 0, sum(sizes), []
    for group, size in zip(batch.groups, sizes, strict=True):
        # A function that failed on a completion leaves it without a total.
        failed += min(size, len({error.completion_id for error in group.scores.errors}))
        reasons += [f"{e.function} {e.cause}: {e.message}" for e in group.scores.errors[:1]]
    lost = len(batch.failures) * (max(sizes) if sizes else 1)
    reasons += [str(failure) for failure in batch.failures[:1]]
    fraction = (failed + lost) / (admitted + lost) if admitted + lost else 0.0
    return fraction, reasons[0] if reasons else ""


def step_metrics(
    batch: Batch,
    result: StepResult,
    times: StepTimes,
    counters: Counters,
    version: int,
    probe_gap: float,
    actors: Mapping[str, int],
    learner_restarts: int = 0,
) -> MetricRow:
    """One row of metrics.jsonl. Means are over completions of the whole step, never of means.

    Args:
        batch: The groups of the step.
        result: What the learner made of them.
        times: Where the time of the step went.
        counters: Those of the run, this step included.
        version: The newest version of the weights.
        probe_gap: How far engine and learner are apart on the probe sequence, nats per token.
        actors: What there is to know of the rollout actors: `Fleet.counts`.
        learner_restarts: How often since then the learner's ranks were started again.
    """
    rewards = [r for group in batch.groups for r in group.scores.totals if r is not None]
    tokens = sum(sum(group.meta.completion_tokens) for group in batch.groups)
    seconds = [s for group in batch.groups for s in group.scores.sample_s]
    truncated = [flag for group in batch.groups for flag in group.meta.truncated]
    # The step trains version `trained_version`; every optimizer step makes a new one.
    trained_version = version - result.applied
    staleness = [trained_version - group.meta.weight_versions[0] for group in batch.groups]
    metrics: MetricRow = {
        "step": batch.step,
        "reward/mean": mean(rewards),
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "reward/zero_variance_fraction": mean(
            zero_variance(group.meta, group.scores) for group in batch.groups
        ),
        "reward/error_rate": reward_errors(batch)[0],
        "rollout/completion_tokens": mean(
            count for group in batch.groups for count in group.meta.completion_tokens
        ),
        "rollout/tokens_per_s": tokens / batch.generation_wall_s,
        "rollout/truncated_fraction": mean(truncated),
        "rollout/refill_rounds": batch.refill_rounds,
        "rollout/groups_lost": len(batch.failures),
        "rollout/overlong_prompts": batch.overlong,
        "learner/loss": result.loss,
        "learner/grad_norm": result.grad_norm,
        "learner/entropy": result.entropy,
        "learner/clip_fraction": result.clip_fraction,
        "learner/reference_kl": result.reference_kl,
        "learner/updates": result.updates,
        "learner/learning_rate": result.learning_rate,
        "learner/loss_scale": result.loss_scale,
        "learner/tokens_per_s": result.tokens / max(times.train, 1e-9),
        "learner/skipped_steps": counters.skipped_steps,
        "learner/restarts": learner_restarts,
        "mismatch/k3_kl": result.k3_kl,
        "mismatch/ratio_mean": result.engine_ratio,
        "mismatch/logprob_abs_max": result.logprob_abs_max,
        "mismatch/corrected_fraction": result.corrected_fraction,
        "mismatch/probe_gap": probe_gap,
        "async/staleness_mean": mean(staleness),
        "async/staleness_max": max(staleness, default=math.nan),
        "weights/version": version,
        "time/step": times.step,
        "time/generate": times.generate,
        "time/reward": times.reward,
        "time/train": times.train,
        "time/sync": times.sync,
        "time/wait": times.wait,
        "time/reward_p50": quantile(seconds, 0.5),
        "time/reward_p99": quantile(seconds, 0.99),
        "time/reward_max": max(seconds, default=math.nan),
        "samples/admitted": counters.admitted,
        "samples/trained": counters.trained,
        "samples/filtered": counters.filtered,
        "samples/failed": counters.failed,
        **{f"actors/{name}": count for name, count in actors.items()},
    }
    metrics |= source_metrics(batch) | episode_metrics([group.meta for group in batch.groups])
    for name in dict.fromkeys(name for g in batch.groups for name in g.scores.by_function):
        metrics[f"reward/{name}"] = mean(
            value for group in batch.groups for value in group.scores.by_function.get(name, ())
        )
    return metrics | logged_metrics(batch)


def source_metrics(batch: Batch) -> dict[str, float]:
    """For each source of rows (part of a mixture): groups, mean reward, fraction solved.

    A step may have no prompt of a source: these keys are not in every row.
    """
    metrics: dict[str, float] = {}
    for source in sorted({item.source for item in batch.outcomes if item.source is not None}):
        found = [item for item in batch.outcomes if item.source == source]
        weighed = [(item.scored, item.reward) for item in found if item.reward is not None]
        tries = sum(item.scored for item in found)
        metrics[f"source/{source}/groups"] = len(found)
        if tries:
            metrics[f"source/{source}/reward"] = sum(n * reward for n, reward in weighed) / tries
            metrics[f"source/{source}/solved"] = sum(item.solved for item in found) / tries
    return metrics


def episode_metrics(metas: Sequence[GroupMeta]) -> dict[str, float]:
    """Turns, tool calls, and why episodes ended; empty where there is no environment.

    Means are over the episodes that did not fail. `episodes/stop/REASON` are fractions
    of all episodes, `episodes/failed/KIND/STAGE` counts.
    """
    episodes = [episode for meta in metas for episode in meta.episodes]
    if not episodes:
        return {}
    well = [episode for episode in episodes if episode.failure is None]
    metrics = {
        "episodes/turns": mean(episode.turns for episode in well),
        "episodes/turns_total": float(sum(episode.turns for episode in episodes)),
    }
    for name in dict.fromkeys(name for episode in well for name in episode.metrics):
        values = [episode.metrics[name] for episode in well if name in episode.metrics]
        metrics[f"episodes/{name}"] = mean(values)
    reasons = Counter(episode.stop_reason for episode in episodes)
    for reason, count in reasons.items():
        metrics[f"episodes/stop/{reason}"] = count / len(episodes)
    failures = [episode.failure for episode in episodes if episode.failure is not None]
    failed = Counter(f"episodes/failed/{one.kind}/{one.stage}" for one in failures)
    return metrics | {name: float(count) for name, count in failed.items()}


def logged_metrics(batch: Batch) -> dict[str, float]:
    """What reward functions logged themselves, and how often each failed, by cause.

    A function may log other names in another step: these keys are not in every row.
    """
    parts: dict[str, list[float | None]] = {}
    errors: Counter[str] = Counter()
    for group in batch.groups:
        for name, row in group.scores.parts.items():
            parts.setdefault(f"reward_part/{name}", []).extend(row)
        for name, values in group.scores.metrics.items():
            parts.setdefault(f"reward_metric/{name}", []).extend(values)
        errors.update(f"reward_errors/{e.function}/{e.cause}" for e in group.scores.errors)
    return {name: mean(values) for name, values in parts.items()} | dict(errors)
