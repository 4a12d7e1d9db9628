"""The result of a step, pooled over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cohort.learner.grpo import LossStats
from cohort.learner.plan import StepPlan
from cohort.learner.spec import RankResult


@dataclass(frozen=True)
class StepResult:
    """One step. Means are over all trained tokens of all ranks and updates, KL in nats per token.

    Attributes:
        version: Steps applied so far, this one included.
        applied: False when no update's gradient was finite, or when no group was left to train on
            (then tokens is 0).
        updates: Optimizer updates that were tried.
        loss: Mean over the updates.
        grad_norm: Mean over the updates, before clipping.
        learning_rate: Of the last update.
        loss_scale: Of the last update.
        k3_kl: Estimate of KL(engine || learner).
        engine_ratio: Mean of learner / engine probability, before any correction.
        logprob_abs_max: Largest |learner - engine| log-prob.
        corrected_fraction: Tokens whose weight the correction changed from that ratio.
        reference_kl: Estimate of KL(policy || reference): k3 over what is trained, or k1 over all
            completions where `algorithm.kl_in` is reward.
        seconds: Of the slowest rank.
    """

    version: int
    applied: bool
    updates: int
    nonfinite_in_a_row: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    entropy: float
    clip_fraction: float
    k3_kl: float
    engine_ratio: float
    logprob_abs_max: float
    corrected_fraction: float
    reference_kl: float
    tokens: int
    seconds: float
    trained: int
    filtered: int
    failed: int
    groups_trained: int
    groups_filtered: int
    groups_failed: int
    row_tokens: int
    padded_tokens: int
    micro_batches: int


def pool(
    plan: StepPlan,
    results: Sequence[RankResult],
    version: int,
    nonfinite_in_a_row: int,
    reference_kl: float | None = None,
) -> StepResult:
    """Pool the ranks' sums and counts.

    Args:
        plan: What the step carried out.
        results: One for each rank; empty when the step had nothing to train on.
        version: Steps applied so far, this one included.
        nonfinite_in_a_row: Updates since the last one that was finite.
        reference_kl: Of the step, in nats per token, where it is not the ranks that measure it.
    """
    stats = sum((update.stats for result in results for update in result.updates), LossStats())
    tokens = max(stats.tokens, 1)
    first = results[0].updates if results else ()
    count = max(len(first), 1)
    return StepResult(
        version=version,
        applied=any(update.applied for update in first),
        updates=len(first),
        nonfinite_in_a_row=nonfinite_in_a_row,
        loss=stats.loss / count,
        grad_norm=sum(update.grad_norm for update in first) / count,
        learning_rate=first[-1].learning_rate if first else 0.0,
        loss_scale=first[-1].loss_scale if first else 1.0,
        entropy=stats.entropy / tokens,
        clip_fraction=stats.clipped / tokens,
        k3_kl=stats.k3 / tokens,
        engine_ratio=stats.engine_ratio / tokens,
        logprob_abs_max=stats.log_ratio_abs_max,
        corrected_fraction=stats.corrected / tokens,
        reference_kl=stats.kl / tokens if reference_kl is None else reference_kl,
        tokens=stats.tokens,
        seconds=max((result.seconds for result in results), default=0.0),
        trained=plan.trained,
        filtered=plan.filtered,
        failed=plan.failed,
        groups_trained=plan.groups_trained,
        groups_filtered=plan.groups_filtered,
        groups_failed=plan.groups_failed,
        row_tokens=plan.row_tokens,
        padded_tokens=plan.padded_tokens,
        micro_batches=plan.micro_batches,
    )
