"""What one token adds to the objective: clipped surrogates and the KL to the reference.

Shapes: T completion tokens, in any order; every tensor is float32. log_ratio_T is the log-prob of
the policy minus that of the policy which the ratio is against (the anchor), with gradient.
"""

from __future__ import annotations

import torch

from cohort.learner.config import AlgorithmConfig, KLEstimator

# exp(20) is far outside every clip range; the clamp keeps the ratio and its gradient finite.
MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp with its argument held within +-MAX_LOG_RATIO."""
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_objective(
    log_ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7): min(r A, clip(r, 1 - low, 1 + high) A).

    Args:
        log_ratio_T: log r.
        advantages_T: A.
        clip_low: Distance of the lower bound from 1.
        clip_high: Distance of the upper bound from 1 (DAPO, arXiv 2503.14476, eq. 8).
        dual_clip: For A < 0, the ratio counts at most this much: max(..., dual_clip A) (arXiv
            1912.09729). None: no such bound.

    Returns:
        (objective_T to be maximised, clipped_T bool, True where clipping takes the gradient away).
    """
    ratio_T = bounded_exp(log_ratio_T)
    free_T = ratio_T * advantages_T
    bound_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    objective_T, clipped_T = torch.minimum(free_T, bound_T), bound_T < free_T
    if dual_clip is not None:
        floor_T = dual_clip * advantages_T
        beyond_T = (advantages_T < 0) & (objective_T < floor_T)
        objective_T = torch.where(beyond_T, floor_T, objective_T)
        clipped_T = clipped_T | beyond_T
    return objective_T, clipped_T


def cispo_objective(
    logprobs_T: torch.Tensor, log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585): sg(min(r, cap)) A log pi; every token has a gradient.

    Returns:
        (objective_T to be maximised, capped_T bool, True where the ratio is above the cap).
    """
    ratio_T = bounded_exp(log_ratio_T.detach())
    return ratio_T.clamp(max=cap) * advantages_T * logprobs_T, ratio_T > cap


def tv_objective(
    logprobs_T: torch.Tensor,
    log_ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPPO with a total-variation trust region (arXiv 2602.04879): r A, or 0 outside the region.

    Outside is a token whose PROBABILITY has already moved, in the direction that its advantage
    pushes, by more than `high` (up) or `low` (down).

    Returns:
        (objective_T to be maximised, masked_T bool, True outside the region).
    """
    with torch.no_grad():
        moved_T = logprobs_T.exp() - (logprobs_T - log_ratio_T).exp()
        masked_T = ((advantages_T > 0) & (moved_T > high)) | ((advantages_T < 0) & (moved_T < -low))
    objective_T = bounded_exp(log_ratio_T) * advantages_T
    return torch.where(masked_T, 0.0, objective_T), masked_T


def token_objective(
    logprobs_T: torch.Tensor,
    log_ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective that `algorithm.objective` names, with its bounds.

    Returns:
        (objective_T to be maximised, clipped_T bool, True where a bound holds the gradient back).
    """
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.objective == "cispo":
        return cispo_objective(logprobs_T, log_ratio_T, advantages_T, 1.0 + high)
    if algorithm.objective == "dppo_tv":
        return tv_objective(logprobs_T, log_ratio_T, advantages_T, low, high)
    return clipped_objective(log_ratio_T, advantages_T, low, high, algorithm.dual_clip)


def kl_penalty(
    logprobs_T: torch.Tensor,
    reference_T: torch.Tensor,
    log_ratio_T: torch.Tensor,
    estimator: KLEstimator,
) -> torch.Tensor:
    """A per-token term whose expected gradient is that of KL(pi || pi_ref), d = log pi - log ref.

    k3: r (exp(-d) - 1 + d), the ratio r with gradient (DeepSeek-V3.2, arXiv 2512.02556): without
    the ratio, k3's gradient is that of the forward KL. k2: d^2 / 2, weighted by the ratio without
    gradient.

    These are the gradients of each position's own KL. The effect of earlier tokens on later
    positions is only in the reward form, see `kl_in_reward`.

    Raises:
        ValueError: The estimator is k1, whose expected gradient as a loss is zero.
    """
    d_T = (logprobs_T - reference_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k3":
        return bounded_exp(log_ratio_T) * ((-d_T).exp() - 1.0 + d_T)
    if estimator == "k2":
        return bounded_exp(log_ratio_T.detach()) * 0.5 * d_T.square()
    raise ValueError(f"{estimator} as a loss does not pull the policy to its reference")


def kl_in_reward(behaviour_T: torch.Tensor, reference_T: torch.Tensor) -> float:
    """k1 = log mu - log ref, summed over a completion, in nats.

    `algorithm.kl_coef` times this is subtracted from the completion's reward.
    """
    return float((behaviour_T - reference_T).sum())
