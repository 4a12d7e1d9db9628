"""Weights and masks of tokens: the engine that sampled them is not quite the learner's policy.

Shapes: T completion tokens, all tokens of a completion together; float32 unless stated.
sequence_T: int64, the completion that a token belongs to, counted from 0. mask_T: bool, False
where a token takes no part.
"""

from __future__ import annotations

import torch

from cohort.learner.config import AlgorithmConfig
from cohort.learner.objectives import bounded_exp


def sequence_means(
    values_T: torch.Tensor, sequence_T: torch.Tensor, mask_T: torch.Tensor
) -> torch.Tensor:
    """[T]: for every token, the mean of `values_T` over the unmasked tokens of its completion."""
    count = int(sequence_T.max()) + 1 if sequence_T.numel() else 0
    sums_S = values_T.new_zeros(count).index_add(0, sequence_T, values_T * mask_T)
    counts_S = values_T.new_zeros(count).index_add(0, sequence_T, mask_T.to(values_T.dtype))
    return (sums_S / counts_S.clamp(min=1.0))[sequence_T]


@torch.no_grad()
def engine_weights(
    mismatch_T: torch.Tensor,
    sequence_T: torch.Tensor,
    mask_T: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> torch.Tensor:
    """The weight of each token for the mismatch of engine and learner.

    With w = exp(mismatch), `algorithm.correction` gives: truncate: min(w, cap) (TIS, the behaviour
    weight of arXiv 2505.24298). mask: w inside [low, cap], else 0 (IcePop). off: 1.
    `algorithm.sequence_mask`: 0 for all of a completion unless the geometric mean of its w lies in
    the band.

    Args:
        mismatch_T: log pi_old - log mu, in nats.
        sequence_T: The completion of each token.
        mask_T: The tokens that take part.
        algorithm: Correction, its bounds, and the sequence mask.

    Returns:
        [T], without gradient.
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

    Too far: -mean(drift) over the completion is more than `algorithm.negative_mask` nats per token
    (DeepSeek-V3.2, arXiv 2512.02556). It masks the objective; the KL in the loss stays, as in the
    paper.

    Args:
        drift_T: log pi - log mu of the policy as it is now, in nats.
        advantages_T: The advantage of each token's completion, or of its turn.
        sequence_T: The completion of each token.
        mask_T: The tokens that take part.
        algorithm: Holds `negative_mask`; None masks nothing.

    Returns:
        [T] bool, True where the token is kept.
    """
    if algorithm.negative_mask is None:
        return torch.ones_like(mask_T)
    left_T = sequence_means(-drift_T, sequence_T, mask_T) > algorithm.negative_mask
    return ~(left_T & (advantages_T < 0))
