"""The GRPO update as pure functions: advantages, ratios, the clipped loss.

Conventions. T: completion tokens, in any order. Behaviour log-probs are the ones the engine
sampled from: after temperature, of exactly the tokens that are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

AdvantageKind = Literal["zscore", "centered", "leave_one_out"]

# Floor of the group's standard deviation: only a group of almost equal rewards ever meets it.
STD_FLOOR = 1e-6
# exp(20) is far outside every clip range; the clamp keeps the ratio and its gradient finite.
MAX_LOG_RATIO = 20.0


def advantages(rewards: Sequence[float | None], kind: AdvantageKind) -> list[float | None]:
    """Group-relative advantages of one group.

    zscore: (r - mean) / std with ddof 0 (DeepSeekMath, arXiv 2402.03300); centered: r - mean
    (Dr. GRPO, arXiv 2503.20783); leave_one_out: r - mean of the others (RLOO, arXiv 2402.14740).

    A reward that is None or not finite takes no part in the statistics and its advantage is None:
    the completion is not trained. With fewer than two valid rewards all are None. Equal rewards
    give exactly 0.0: equality is tested on the rewards themselves, because the rounding residue
    of `r - mean` divided by an equally small std would give advantages of order 1.
    """
    valid = [r for r in rewards if r is not None and math.isfinite(r)]
    n = len(valid)
    if n < 2:
        return [None] * len(rewards)
    if all(r == valid[0] for r in valid):
        return [0.0 if r is not None and math.isfinite(r) else None for r in rewards]
    mean = math.fsum(valid) / n
    scale = 1.0
    if kind == "zscore":
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in valid) / n)
        scale = 1.0 / max(std, STD_FLOOR)
    elif kind == "leave_one_out":
        # r - (n mean - r)/(n - 1) = n/(n - 1) (r - mean)
        scale = n / (n - 1)
    return [(r - mean) * scale if r is not None and math.isfinite(r) else None for r in rewards]


def token_weights(
    lengths: Sequence[int],
    aggregation: Literal["token", "sequence", "constant"],
    max_tokens: int,
) -> list[float]:
    """The weight of each token of each completion in the loss of one optimizer step.

    lengths: tokens of every completion that the step trains, over all groups and ranks. With these
    weights the loss is a plain weighted sum over tokens, so that no split into micro-batches,
    rows or ranks can change it.

    token: 1 / sum of lengths. sequence: 1 / (completions * length). constant: 1 / (completions *
    max_tokens).
    """
    count = len(lengths)
    if aggregation == "token":
        return [1.0 / sum(lengths)] * count
    if aggregation == "sequence":
        return [1.0 / (count * length) for length in lengths]
    return [1.0 / (count * max_tokens)] * count


def clipped_objective(
    log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347) per token; two bounds as in arXiv 2503.14476.

    Returns (objective_T to be maximised, clipped_T: True where clipping takes the gradient away).
    """
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_T = ratio_T * advantages_T
    bound_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    return torch.minimum(free_T, bound_T), bound_T < free_T


@dataclass(frozen=True)
class LossStats:
    """What a forward pass saw, as sums and one maximum, so that parts pool exactly.

    entropy is in nats; k3 estimates KL(engine || learner) on the engine's own samples
    (http://joschu.net/blog/kl-approx.html): exp(d) - 1 - d with d = learner - engine log-prob.
    """

    tokens: int = 0
    loss: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    k3: float = 0.0
    log_ratio_abs_max: float = 0.0

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


def policy_loss(
    logprobs_T: torch.Tensor,
    behaviour_T: torch.Tensor,
    advantages_T: torch.Tensor,
    weights_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
    entropy_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, LossStats]:
    """The clipped GRPO loss of some of the tokens of a step: a scalar, and its statistics.

    logprobs_T: the learner's, with gradient. behaviour_T: the engine's. weights_T: see
    `token_weights`; 0 masks a token out of the loss and of every statistic.
    ratio = exp(logprobs_T - behaviour_T).
    """
    mask_T = weights_T > 0
    # Masked before exp: 0 * inf is nan in the backward pass.
    log_ratio_T = torch.where(mask_T, logprobs_T - behaviour_T, 0.0)
    objective_T, clipped_T = clipped_objective(log_ratio_T, advantages_T, clip_low, clip_high)
    loss = -(weights_T * torch.where(mask_T, objective_T, 0.0)).sum()
    with torch.no_grad():
        d_T = log_ratio_T.detach()
        k3_T = d_T.clamp(max=MAX_LOG_RATIO).exp() - 1.0 - d_T
        stats = LossStats(
            tokens=int(mask_T.sum()),
            loss=float(loss),
            clipped=float((clipped_T & mask_T).sum()),
            entropy=0.0 if entropy_T is None else float(torch.where(mask_T, entropy_T, 0.0).sum()),
            k3=float(k3_T.sum()),
            log_ratio_abs_max=float(d_T.abs().max()) if d_T.numel() else 0.0,
        )
    return loss, stats
