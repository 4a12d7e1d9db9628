"""The GRPO update as pure functions: advantages, token weights, ratios, corrections, KL, the loss.

Conventions. T: completion tokens, in any order. Behaviour log-probs are the ones the engine
sampled from (mu): after temperature, of exactly the tokens that are trained. Old log-probs are the
learner's own at the start of the step (pi_old). Every tensor is float32 unless said.

The loss of an optimizer step is a plain weighted sum over its tokens; the weights hold every
normaliser, so that no split into micro-batches, rows or ranks can change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeGuard

import torch

from cohort.learner.config import Aggregation, AlgorithmConfig, Baseline, KLEstimator, Scale

# Floor of the standard deviation: only rewards that are almost equal ever meet it.
STD_FLOOR = 1e-6
# exp(20) is far outside every clip range; the clamp keeps the ratio and its gradient finite.
MAX_LOG_RATIO = 20.0


def valid(reward: float | None) -> TypeGuard[float]:
    """Whether a reward takes part: None and what is not finite does not."""
    return reward is not None and math.isfinite(reward)


def all_equal(rewards: Sequence[float | None]) -> bool:
    """Whether the rewards that take part are at least two, and equal but for rounding.

    Equal: within 1e-6 (STD_FLOOR), or within 1e-9 of their size. The same answer, scored twice,
    can differ by that much: weighted sums round, and reward models compute in float32.
    """
    chosen = [r for r in rewards if valid(r)]
    return len(chosen) >= 2 and math.isclose(
        min(chosen), max(chosen), rel_tol=1e-9, abs_tol=STD_FLOOR
    )


def standard_deviation(values: Sequence[float]) -> float:
    """Of the population (ddof 0), and never below STD_FLOOR."""
    mean = math.fsum(values) / len(values)
    # hypot: the squares of large rewards would overflow.
    return max(math.hypot(*(v - mean for v in values)) / math.sqrt(len(values)), STD_FLOOR)


def advantages(
    rewards: Sequence[float | None],
    baseline: Baseline = "mean",
    scale: Scale = "group",
    batch_std: float | None = None,
) -> list[float | None]:
    """Advantages of one group: (reward - baseline) / scale.

    baseline: mean of the group; leave_one_out: mean of the other completions (RLOO, arXiv
    2402.14740); none. scale: group: the standard deviation of the group, ddof 0 (DeepSeekMath,
    arXiv 2402.03300); batch: `batch_std`, that of all rewards trained in the step; none (Dr. GRPO,
    arXiv 2503.20783).

    A reward that is None or not finite takes no part in the statistics and its advantage is None:
    the completion is not trained. With fewer than two valid rewards all are None. Equal rewards
    (see `all_equal`) give exactly 0.0 with a baseline: the rounding residue of `r - mean` divided
    by an equally small std would give advantages of order 1.

    Raises ValueError for scale="batch" without `batch_std`.
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

    kl: of each completion, see `kl_in_reward`; `algorithm.kl_coef` times it is taken off its
    reward. Where the rewards are all equal before that, scale=group does not divide: it would
    bring any difference in KL, however small, to -1 and +1.

    A demonstration counts 1 whatever its reward, and may be the only one of its group; None or a
    reward that is not finite leaves it out.
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
    """The rewards, with `coefficient` times each completion's KL taken off."""
    return [
        None if reward is None else reward - coefficient * k
        for reward, k in zip(rewards, kl, strict=True)
    ]


def overlong_penalty(tokens: int, max_tokens: int, buffer: float) -> float:
    """Soft length penalty added to the reward, in [-1, 0] (DAPO, arXiv 2503.14476, eq. 13).

    buffer: the share of max_tokens over which the penalty grows from 0 to 1; 0 is no penalty.
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

    lengths: for every prompt, the tokens of its completions, over all that the update trains.
    sampled: the completions with a reward that the update stands for, those included that are
    not trained because their group carries no signal or because they were cut; None: as many as
    `lengths` has.

    token: 1 / all tokens. sequence: 1 / (completions * length). prompt: 1 / (prompts * tokens of
    the prompt's completions). These three are means over what is trained. constant:
    1 / (sampled * max_tokens), whatever else is trained (Dr. GRPO, arXiv 2503.20783).
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


def clipped_objective(
    log_ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347) per token; two bounds as in arXiv 2503.14476.

    dual_clip: for negative advantages, the ratio counts at most this much (arXiv 1912.09729).
    Returns (objective_T to be maximised, clipped_T: True where clipping takes the gradient away).
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
    """CISPO (MiniMax-M1, arXiv 2506.13585): sg(min(ratio, cap)) * A * log pi; no token is lost.

    Returns (objective_T, capped_T).
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
    """DPPO with a total-variation trust region (arXiv 2602.04879).

    ratio * A, but nothing for a token whose PROBABILITY has already moved, in the direction its
    advantage pushes, by more than `high` (up) or `low` (down). Returns (objective_T, masked_T).
    """
    with torch.no_grad():
        moved_T = logprobs_T.exp() - (logprobs_T - log_ratio_T).exp()
        masked_T = ((advantages_T > 0) & (moved_T > high)) | ((advantages_T < 0) & (moved_T < -low))
    objective_T = bounded_exp(log_ratio_T) * advantages_T
    return torch.where(masked_T, 0.0, objective_T), masked_T


def kl_penalty(
    logprobs_T: torch.Tensor,
    reference_T: torch.Tensor,
    log_ratio_T: torch.Tensor,
    estimator: KLEstimator,
) -> torch.Tensor:
    """A per-token term whose expected gradient is that of KL(pi || pi_ref), d = log pi - log ref.

    k3: ratio * (exp(-d) - 1 + d), the ratio with gradient (DeepSeek-V3.2, arXiv 2512.02556):
    without the ratio, k3's gradient is that of the forward KL. k2: d^2 / 2, weighted by the ratio
    without gradient. k1 = d as a loss has an expected gradient of zero and is refused.

    These are the gradients of each position's own KL. What earlier tokens do to the positions
    that come later is only in the reward form, see `kl_in_reward`.
    """
    d_T = (logprobs_T - reference_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k3":
        return bounded_exp(log_ratio_T) * ((-d_T).exp() - 1.0 + d_T)
    if estimator == "k2":
        return bounded_exp(log_ratio_T.detach()) * 0.5 * d_T.square()
    raise ValueError(f"{estimator} as a loss does not pull the policy to its reference")


def kl_in_reward(behaviour_T: torch.Tensor, reference_T: torch.Tensor) -> float:
    """k1 summed over a completion: what `algorithm.kl_coef` times it is taken off its reward."""
    return float((behaviour_T - reference_T).sum())


def bounded_exp(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp with its argument held within +-MAX_LOG_RATIO."""
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_means(
    values_T: torch.Tensor, sequence_T: torch.Tensor, mask_T: torch.Tensor
) -> torch.Tensor:
    """For every token, the mean of `values_T` over the unmasked tokens of its completion.

    sequence_T: int64, which completion a token belongs to, counted from 0.
    """
    count = int(sequence_T.max()) + 1 if sequence_T.numel() else 0
    sums_S = values_T.new_zeros(count).index_add(0, sequence_T, values_T * mask_T)
    counts_S = values_T.new_zeros(count).index_add(0, sequence_T, mask_T.to(values_T.dtype))
    return (sums_S / counts_S.clamp(min=1.0))[sequence_T]


@torch.no_grad()
def correction_weights(
    mismatch_T: torch.Tensor,
    drift_T: torch.Tensor,
    advantages_T: torch.Tensor,
    sequence_T: torch.Tensor,
    mask_T: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> torch.Tensor:
    """What each token's objective is multiplied by: `engine_weights` and `negative_mask`."""
    weight_T = engine_weights(mismatch_T, sequence_T, mask_T, algorithm)
    return weight_T * negative_mask(drift_T, advantages_T, sequence_T, mask_T, algorithm)


@torch.no_grad()
def engine_weights(
    mismatch_T: torch.Tensor,
    sequence_T: torch.Tensor,
    mask_T: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> torch.Tensor:
    """The weight of each token because engine and learner are not the same policy.

    mismatch_T: log pi_old - log mu; w = exp of it. `algorithm.correction`: truncate: min(w, cap)
    (TIS, arXiv 2505.24298's behaviour weight); mask: w inside [low, cap], else 0 (IcePop).
    `sequence_mask`: 0 for all of a completion unless the geometric mean of its w lies in the band.
    """
    w_T = bounded_exp(mismatch_T)
    if algorithm.correction == "truncate":
        weight_T = w_T.clamp(max=algorithm.correction_cap)
    elif algorithm.correction == "mask":
        outside_T = (w_T < algorithm.correction_low) | (w_T > algorithm.correction_cap)
        weight_T = torch.where(outside_T, 0.0, w_T)  # nan is not outside: it must be seen
    else:
        weight_T = torch.ones_like(w_T)
    if algorithm.sequence_mask is not None:
        low, high = algorithm.sequence_mask
        geometric_T = sequence_means(mismatch_T, sequence_T, mask_T).exp()
        weight_T = weight_T * ~((geometric_T < low) | (geometric_T > high))
    return weight_T


@torch.no_grad()
def negative_mask(
    drift_T: torch.Tensor,
    advantages_T: torch.Tensor,
    sequence_T: torch.Tensor,
    mask_T: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> torch.Tensor:
    """False for completions with a negative advantage that the policy has left too far.

    drift_T: log pi - log mu of the policy as it is now. Too far: by more than
    `algorithm.negative_mask` nats per token (DeepSeek-V3.2, arXiv 2512.02556). It masks the
    objective; the KL in the loss stays, as in the paper.
    """
    if algorithm.negative_mask is None:
        return torch.ones_like(mask_T)
    left_T = sequence_means(-drift_T, sequence_T, mask_T) > algorithm.negative_mask
    return ~(left_T & (advantages_T < 0))


@dataclass(frozen=True)
class LossStats:
    """What forward passes saw, as sums over tokens and one maximum, so that parts pool exactly.

    clipped: tokens whose gradient the objective bounds or takes away. entropy: nats. k3 estimates
    KL(engine || learner) on the engine's own samples (http://joschu.net/blog/kl-approx.html):
    exp(d) - 1 - d with d = learner - engine log-prob, the learner's at the start of the step;
    log_ratio_abs_max is the largest |d|, engine_ratio the sum of exp(d): raw, before any
    correction. corrected: tokens whose weight the correction capped or took away. kl: k3 of the
    policy against its reference.
    """

    tokens: int = 0
    loss: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    k3: float = 0.0
    log_ratio_abs_max: float = 0.0
    engine_ratio: float = 0.0
    corrected: float = 0.0
    kl: float = 0.0

    def __add__(self, other: LossStats) -> LossStats:
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "log_ratio_abs_max"
        }
        pair = (self.log_ratio_abs_max, other.log_ratio_abs_max)
        # max() drops a nan that comes second; a nan must stay visible.
        peak = math.nan if any(math.isnan(value) for value in pair) else max(pair)
        return LossStats(**sums, log_ratio_abs_max=peak)


def cross_entropy_loss(
    logprobs_T: torch.Tensor, weights_T: torch.Tensor, entropy_T: torch.Tensor | None = None
) -> tuple[torch.Tensor, LossStats]:
    """Minus the weighted log-likelihood of demonstration tokens, and its statistics.

    With the weights of `token_weights(..., "token", ...)` and all tokens of the step it is the mean
    negative log-likelihood, nats a token. A weight of 0 masks a token out. No engine sampled these
    tokens, so what compares with one says that there is no difference.
    """
    mask_T = weights_T > 0
    loss = -(weights_T * torch.where(mask_T, logprobs_T, 0.0)).sum()
    tokens = int(mask_T.sum())
    entropy = 0.0
    if entropy_T is not None:
        entropy = float(torch.where(mask_T, entropy_T.detach(), 0.0).sum())
    return loss, LossStats(
        tokens=tokens, loss=float(loss.detach()), entropy=entropy, engine_ratio=float(tokens)
    )


def policy_loss(
    logprobs_T: torch.Tensor,
    behaviour_T: torch.Tensor,
    advantages_T: torch.Tensor,
    weights_T: torch.Tensor,
    sequence_T: torch.Tensor,
    algorithm: AlgorithmConfig,
    *,
    entropy_T: torch.Tensor | None = None,
    old_T: torch.Tensor | None = None,
    reference_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, LossStats]:
    """The loss of some of the tokens of an optimizer step: a scalar, and its statistics.

    logprobs_T: the learner's, with gradient. behaviour_T: the engine's. weights_T: see
    `token_weights`; 0 masks a token out of the loss and of every statistic. sequence_T: int64,
    which completion a token belongs to; all tokens of a completion are here together.
    old_T: the learner's at the start of the step; None: as now (the first update of a step).
    reference_T: of the reference policy; needed when `algorithm.kl_in` is loss and kl_coef > 0.

    With `algorithm.anchor` = learner the ratio is pi / pi_old and the engine's mismatch is put
    right by a weight; with engine it is pi / mu, which holds the mismatch already.

    `algorithm.objective` = cross_entropy looks at none of that: see `cross_entropy_loss`.
    """
    if algorithm.objective == "cross_entropy":
        return cross_entropy_loss(logprobs_T, weights_T, entropy_T)
    mask_T = weights_T > 0

    def clean(values_T: torch.Tensor) -> torch.Tensor:
        # Masked before anything is computed: 0 * inf and 0 * nan are nan in the backward pass.
        return torch.where(mask_T, values_T, 0.0)

    logprobs_T, behaviour_T = clean(logprobs_T), clean(behaviour_T)
    advantages_T = clean(advantages_T)
    now_T = logprobs_T.detach()
    old_T = now_T if old_T is None else clean(old_T)
    anchor_T = behaviour_T if algorithm.anchor == "engine" else old_T
    log_ratio_T = logprobs_T - anchor_T
    scored_T = log_ratio_T
    if algorithm.ratio == "sequence":
        # GSPO (arXiv 2507.18071): the geometric mean of the ratios, for every token of a sequence.
        scored_T = sequence_means(log_ratio_T, sequence_T, mask_T)
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.objective == "cispo":
        objective_T, clipped_T = cispo_objective(logprobs_T, scored_T, advantages_T, 1.0 + high)
    elif algorithm.objective == "dppo_tv":
        objective_T, clipped_T = tv_objective(logprobs_T, scored_T, advantages_T, low, high)
    else:
        objective_T, clipped_T = clipped_objective(
            scored_T, advantages_T, low, high, algorithm.dual_clip
        )
    mismatch_T = old_T - behaviour_T
    correction_T = engine_weights(mismatch_T, sequence_T, mask_T, algorithm)
    kept_T = negative_mask(now_T - behaviour_T, advantages_T, sequence_T, mask_T, algorithm)
    objective_T = objective_T * kept_T
    if algorithm.kl_coef > 0 and algorithm.kl_in == "loss":
        if reference_T is None:
            raise ValueError("algorithm.kl_coef > 0 needs the reference policy's log-probs")
        penalty_T = kl_penalty(logprobs_T, clean(reference_T), log_ratio_T, algorithm.kl_estimator)
        objective_T = objective_T - algorithm.kl_coef * penalty_T
    loss = -(weights_T * correction_T * objective_T).sum()
    if algorithm.entropy_coef > 0:
        if entropy_T is None:
            raise ValueError("algorithm.entropy_coef > 0 needs the entropies")
        loss = loss - algorithm.entropy_coef * (weights_T * clean(entropy_T)).sum()

    with torch.no_grad():
        w_T = bounded_exp(mismatch_T)
        kl = 0.0
        if reference_T is not None:
            d_T = (now_T - clean(reference_T)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl = float(((-d_T).exp() - 1.0 + d_T).sum())
        changed_T = (correction_T != (w_T if algorithm.correction != "off" else 1.0)) | ~kept_T
        stats = LossStats(
            tokens=int(mask_T.sum()),
            loss=float(loss),
            clipped=float((clipped_T & mask_T).sum()),
            entropy=0.0 if entropy_T is None else float(clean(entropy_T).sum()),
            k3=float((w_T - 1.0 - mismatch_T).sum()),
            log_ratio_abs_max=float(mismatch_T.abs().max()) if mismatch_T.numel() else 0.0,
            engine_ratio=float((w_T * mask_T).sum()),
            corrected=float((changed_T & mask_T).sum()),
            kl=kl,
        )
    return loss, stats
