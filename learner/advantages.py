"""Rewards of one group -> advantages, as pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeGuard

from cohort.learner.config import AlgorithmConfig, Baseline, Scale

# The rewards, or the advantages, of the turns of each completion; None where it takes no part.
ByTurn = list[tuple[float, ...] | None]

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


def turn_advantages(
    rewards: Sequence[tuple[float, ...] | None],
    algorithm: AlgorithmConfig,
    batch_std: float | None = None,
    *,
    scaled: bool = True,
) -> ByTurn:
    """Advantages of the turns of one group: GRPO with process supervision.

    All turn rewards of the group are normalised together, as `advantages` does it; a turn's
    advantage is the sum of the normalised rewards of it and of the turns after it (DeepSeekMath,
    arXiv 2402.03300, section 4.1.3).

    Args:
        rewards: Of each completion, those of its turns. None, or one that is not finite, leaves the
            completion out.
        algorithm: Baseline and scale, over turns in place of completions.
        batch_std: The standard deviation of all turn rewards that the step trains.
        scaled: False: nothing is divided.

    Returns:
        Of each completion, the advantages of its turns; None where it is not trained. All are None
        with fewer than two completions that take part.

    Example:
        >>> turn_advantages([(1.0, 1.0), (1.0, -3.0)], AlgorithmConfig(scale="none"))
        [(2.0, 1.0), (-2.0, -3.0)]
    """
    whole = [turns if turns and all(map(valid, turns)) else None for turns in rewards]
    chosen = [turns for turns in whole if turns is not None]
    if len(chosen) < 2:
        return [None] * len(rewards)
    flat = [reward for turns in chosen for reward in turns]
    scale = algorithm.scale if scaled else "none"
    values = iter(advantages(flat, algorithm.baseline, scale, batch_std))
    found: ByTurn = []
    for turns in whole:
        if turns is None:
            found.append(None)
            continue
        own = [next(values) or 0.0 for _ in turns]
        found.append(tuple(accumulate(reversed(own)))[::-1])
    return found


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
