"""Credit: which completions a step trains, with which advantages and token weights.

Works on rewards and lengths alone, without tensors, so that the driver and the report can use it:

    task rewards -> length penalty, KL -> advantages -> weights of the tokens in the loss

The loss of an optimizer update is a plain weighted sum over its tokens. The weights hold every
normaliser, so that no split into rows, micro-batches or ranks can change the loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.learner.config import Aggregation, AlgorithmConfig, Baseline, Scale

# Floor of the standard deviation: only rewards that are almost equal ever meet it.
STD_FLOOR = 1e-6


def valid(reward: float | None) -> TypeGuard[float]:
    """Whether a reward takes part: None, NaN and infinities do not."""
    return reward is not None and math.isfinite(reward)


def all_equal(rewards: Sequence[float | None]) -> bool:
    """Whether at least two rewards take part, and all of these are equal up to rounding.

    Equal: within 1e-6 (STD_FLOOR), or within 1e-9 of their size. The same answer, scored twice,
    can differ by that much: weighted sums round, and reward models compute in float32.
    """
    chosen = [r for r in rewards if valid(r)]
    return len(chosen) >= 2 and math.isclose(
        min(chosen), max(chosen), rel_tol=1e-9, abs_tol=STD_FLOOR
    )


def standard_deviation(values: Sequence[float]) -> float:
    """Of the population (ddof 0), and never below STD_FLOOR."""
    mean = statistics.fmean(values)
    # hypot: the squares of large rewards would overflow.
    return max(math.hypot(*(v - mean for v in values)) / math.sqrt(len(values)), STD_FLOOR)


def advantages(
    rewards: Sequence[float | None],
    baseline: Baseline = "mean",
    scale: Scale = "group",
    batch_std: float | None = None,
) -> list[float | None]:
    """Advantages of one group: A_i = (r_i - baseline) / scale.

    Equal rewards (see `all_equal`) give exactly 0.0 with a baseline: the rounding residue of
    r - mean, divided by an equally small standard deviation, would give advantages of order 1.

    Args:
        rewards: One for each completion. One that is None or not finite takes no part in the
            statistics, and its completion is not trained.
        baseline: mean: of the group. leave_one_out: mean of the other completions (RLOO, arXiv
            2402.14740). none: 0.
        scale: group: the standard deviation of the group, ddof 0 (GRPO, DeepSeekMath, arXiv
            2402.03300, section 4.1.2). batch: `batch_std`. none: 1 (Dr. GRPO, arXiv 2503.20783).
        batch_std: The standard deviation of all rewards that the step trains.

    Returns:
        One advantage for each completion; None where it is not trained. All are None with fewer
        than two valid rewards.

    Raises:
        ValueError: scale is batch, and `batch_std` is missing.

    Example:
        >>> advantages([1.0, 1.0, 0.0, 0.0])
        [1.0, 1.0, -1.0, -1.0]
    """
    chosen = [r for r in rewards if valid(r)]
    n = len(chosen)
    if n < 2:
        return [None] * len(rewards)
    if baseline != "none" and all_equal(chosen):
        return [0.0 if valid(r) else None for r in rewards]
    mean = math.fsum(chosen) / n if baseline != "none" else 0.0
    # r - (n mean - r)/(n - 1) = n/(n - 1) (r - mean)
    factor = n / (n - 1) if baseline == "leave_one_out" else 1.0
    if scale == "group":
        factor /= standard_deviation(chosen)
    elif scale == "batch":
        if batch_std is None:
            raise ValueError("scale='batch' needs batch_std")
        factor /= max(batch_std, STD_FLOOR)
    return [(r - mean) * factor if valid(r) else None for r in rewards]


def group_advantages(
    rewards: Sequence[float | None],
    algorithm: AlgorithmConfig,
    batch_std: float | None = None,
    kl: Sequence[float] | None = None,
) -> list[float | None]:
    """The advantages that `algorithm` gives one group; see `advantages`.

    A demonstration counts 1 whatever its reward, and may be the only one of its group; None or a
    reward that is not finite leaves it out.

    Args:
        rewards: One for each completion, with the length penalty.
        algorithm: Objective, baseline and scale.
        batch_std: The standard deviation of all rewards that the step trains.
        kl: Of each completion, in nats; `algorithm.kl_coef` times it is subtracted from its
            reward. Where the rewards are all equal before that, scale=group does not divide: it
            would bring any difference in KL, however small, to -1 and +1.
    """
    if algorithm.objective == "cross_entropy":
        return [1.0 if valid(reward) else None for reward in rewards]
    if kl is None:
        return advantages(rewards, algorithm.baseline, algorithm.scale, batch_std)
    alone = algorithm.scale == "group" and all_equal(rewards)
    return advantages(
        without_kl(rewards, kl, algorithm.kl_coef),
        algorithm.baseline,
        "none" if alone else algorithm.scale,
        batch_std,
    )


def without_kl(
    rewards: Sequence[float | None], kl: Sequence[float], coefficient: float
) -> list[float | None]:
    """r_i - coefficient * KL_i; a reward that is None stays None."""
    return [
        None if reward is None else reward - coefficient * k
        for reward, k in zip(rewards, kl, strict=True)
    ]


def overlong_penalty(tokens: int, max_tokens: int, buffer: float) -> float:
    """Soft length penalty that is added to the reward (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        tokens: Length of the completion.
        max_tokens: The longest completion that the run allows.
        buffer: The fraction of max_tokens over which the penalty grows from 0 to 1; 0: no penalty.

    Returns:
        A number in [-1, 0].
    """
    if buffer == 0:
        return 0.0
    cache = buffer * max_tokens
    return min(0.0, max(-1.0, (max_tokens - tokens) / cache - 1.0))


def token_weights(
    lengths: Sequence[Sequence[int]],
    aggregation: Aggregation,
    max_tokens: int,
    sampled: int | None = None,
) -> list[list[float]]:
    """The weight of each token of each completion in the loss of one optimizer update.

    token: 1 / all tokens (DAPO, arXiv 2503.14476, eq. 12). sequence: 1 / (completions * length)
    (GRPO, arXiv 2402.03300, eq. 3). prompt: 1 / (prompts * tokens of the prompt's completions).
    These three are means over what is trained. constant: 1 / (sampled * max_tokens), whatever else
    is trained (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: For every prompt, the tokens of its completions, over all that the update trains.
        aggregation: `algorithm.aggregation`.
        max_tokens: The longest completion that the run allows.
        sampled: Usable completions that the update stands for, including those that are not
            trained because their group carries no signal or because they were truncated; None: as
            many as `lengths` has.

    Returns:
        For every prompt, the weight of each token of each of its completions.
    """
    completions = sum(len(group) for group in lengths)
    tokens = sum(sum(group) for group in lengths)
    prompts = len(lengths)
    weights: list[list[float]] = []
    for group in lengths:
        if aggregation == "token":
            weights.append([1.0 / tokens] * len(group))
        elif aggregation == "sequence":
            weights.append([1.0 / (completions * length) for length in group])
        elif aggregation == "prompt":
            weights.append([1.0 / (prompts * sum(group))] * len(group))
        else:
            counted = completions if sampled is None else sampled
            weights.append([1.0 / (counted * max_tokens)] * len(group))
    return weights


def task_rewards(meta: GroupMeta, scores: ScoreMeta) -> list[float | None]:
    """The weighted totals of the reward functions, before anything else shapes them.

    Returns:
        One reward for each completion. None without tokens: such a completion has no action to
        reinforce, whatever its reward.

    Raises:
        ValueError: Sizes and scores do not belong together.
    """
    _check_pair(meta, scores)
    return [
        None if tokens == 0 else reward
        for reward, tokens in zip(scores.totals, meta.completion_tokens, strict=True)
    ]


def _check_pair(meta: GroupMeta, scores: ScoreMeta) -> None:
    if meta.group_id != scores.group_id:
        raise ValueError(f"group {meta.group_id} was paired with the scores of {scores.group_id}")
    counts = (len(meta.completion_ids), len(meta.completion_tokens), len(scores.totals))
    if len(set(counts)) != 1:
        raise ValueError(f"group {meta.group_id}: {counts} ids, lengths and rewards differ")
    if meta.prompt_tokens < 1:
        raise ValueError(f"group {meta.group_id}: an empty prompt predicts nothing")


def zero_variance(meta: GroupMeta, scores: ScoreMeta) -> bool:
    """Whether a group's task rewards are two or more, and all equal; see `all_equal`."""
    return all_equal(task_rewards(meta, scores))


def shaped_rewards(
    meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig, max_tokens: int
) -> list[float | None]:
    """The task rewards with the length penalty; a KL in the reward is not subtracted yet."""
    return [
        None
        if reward is None
        else reward + overlong_penalty(tokens, max_tokens, algorithm.overlong_buffer)
        for reward, tokens in zip(task_rewards(meta, scores), meta.completion_tokens, strict=True)
    ]


def informative(meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig) -> bool:
    """Whether the policy gradient of the task rewards of a group can be anything but zero.

    Neither the length penalty nor the KL counts: without a difference in the task, the scale would
    bring the smallest difference in them to full size.
    """
    by_task = group_advantages(task_rewards(meta, scores), algorithm, 1.0)
    return any(value and not _left_out(meta, i, algorithm) for i, value in enumerate(by_task))


def _left_out(meta: GroupMeta, index: int, algorithm: AlgorithmConfig) -> bool:
    # A truncated completion stays in its group's statistics: it was truncated for being long.
    return algorithm.mask_truncated and meta.truncated[index]


@dataclass(frozen=True)
class TrainedGroup:
    """A group that a step trains.

    Attributes:
        advantages: Of each completion that is trained, by its index in the group.
        usable: Completions with an advantage, including those that `algorithm.mask_truncated`
            leaves out.
    """

    meta: GroupMeta
    advantages: dict[int, float]
    usable: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion that is trained, in the order of `advantages`."""
        return [self.meta.completion_tokens[i] for i in self.advantages]


@dataclass(frozen=True)
class StepCredit:
    """Which completions of a step are trained; trained + filtered + failed = all that came in.

    Attributes:
        filtered_sizes: Usable completions of each group that is filtered as a whole.
        filtered: Completions whose group's task rewards are all equal, or that were truncated
            while `algorithm.mask_truncated` leaves these out.
        failed: Completions without reward or tokens, or alone in their group (unless they are
            demonstrations).
    """

    groups: tuple[TrainedGroup, ...]
    filtered_sizes: tuple[int, ...]
    filtered: int
    failed: int
    groups_failed: int

    @property
    def trained(self) -> int:
        """Completions that are trained."""
        return sum(len(group.advantages) for group in self.groups)

    @property
    def advantages(self) -> dict[str, float]:
        """The advantage of every completion that is trained, by its id."""
        return {
            group.meta.completion_ids[i]: value
            for group in self.groups
            for i, value in group.advantages.items()
        }


def assign_credit(
    groups: Sequence[tuple[GroupMeta, ScoreMeta]],
    algorithm: AlgorithmConfig,
    max_tokens: int,
    kl: Mapping[str, float] | None = None,
) -> StepCredit:
    """Choose the completions that a step trains, and compute their advantages.

    Args:
        groups: Sizes and rewards of all groups of the step.
        algorithm: Baseline, scale, filters and penalties.
        max_tokens: The longest completion that the run allows.
        kl: By completion id, the KL to subtract where `algorithm.kl_in` is reward, in nats; see
            `cohort.learner.objectives.kl_in_reward`.

    Raises:
        ValueError: A group's sizes and scores do not belong together.
    """
    kept: list[tuple[TrainedGroup, list[float | None], list[float] | None]] = []
    filtered_sizes: list[int] = []
    filtered = failed = groups_failed = 0
    for meta, scores in groups:
        rewards = shaped_rewards(meta, scores, algorithm, max_tokens)
        # A completion without tokens was not scored by the reference, and has no reward either.
        group_kl = None if kl is None else [kl.get(name, 0.0) for name in meta.completion_ids]
        values = group_advantages(rewards, algorithm, 1.0, group_kl)
        chosen = _chosen(meta, values, algorithm)
        usable = len(values) - values.count(None)
        failed += len(values) - usable
        if not usable:
            groups_failed += 1
        elif not chosen or (
            algorithm.drop_zero_variance and not informative(meta, scores, algorithm)
        ):
            filtered += usable
            filtered_sizes.append(usable)
        else:
            filtered += usable - len(chosen)
            kept.append((TrainedGroup(meta, chosen, usable), rewards, group_kl))

    trained = [group for group, _, _ in kept]
    if algorithm.scale == "batch" and kept:
        # The batch's standard deviation is that of the groups that are kept.
        final = [
            rewards if group_kl is None else without_kl(rewards, group_kl, algorithm.kl_coef)
            for _, rewards, group_kl in kept
        ]
        std = standard_deviation([r for rewards in final for r in rewards if valid(r)])
        trained = [
            replace(
                group,
                advantages=_chosen(
                    group.meta, group_advantages(rewards, algorithm, std, group_kl), algorithm
                ),
            )
            for group, rewards, group_kl in kept
        ]
    return StepCredit(tuple(trained), tuple(filtered_sizes), filtered, failed, groups_failed)


def _chosen(
    meta: GroupMeta, values: Sequence[float | None], algorithm: AlgorithmConfig
) -> dict[int, float]:
    """The advantages of the completions that are trained, by index."""
    return {
        i: value
        for i, value in enumerate(values)
        if value is not None and not _left_out(meta, i, algorithm)
    }
