"""The loss of GRPO and its variants, as a pure function of log-probs, advantages and weights.

Shapes: T completion tokens, in any order, all tokens of a completion together. Tensors are float32
unless stated. Policies: pi is the learner's as it is now, pi_old the learner's at the start of the
step, mu the engine's: log-probs after temperature, of exactly the tokens that were sampled.

The loss of an optimizer step is a plain weighted sum over its tokens (`policy_loss`); the weights
come from `cohort.learner.credit` and hold every normaliser, so that no split into micro-batches,
rows or ranks can change it. The parts of the sum are in `cohort.learner.objectives` (what a token
adds) and `cohort.learner.corrections` (what it is multiplied by).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from cohort.learner.config import AlgorithmConfig
from cohort.learner.corrections import engine_weights, negative_mask, sequence_means
from cohort.learner.objectives import (
    MAX_LOG_RATIO,
    bounded_exp,
    kl_penalty,
    token_objective,
)


@dataclass(frozen=True)
class LossInputs:
    """What the loss of some of the tokens of an optimizer step is computed from; [T] each.

    Attributes:
        logprobs_T: log pi, with gradient.
        behaviour_T: log mu.
        advantage_T: The advantage of the token's completion, or of its turn.
        weight_T: The token's weight in the loss, see `cohort.learner.credit.token_weights`. 0
            masks it out of the loss and of every statistic.
        sequence_T: int64, the completion that the token belongs to, counted from 0; all turns of
            an episode are one.
        entropy_T: Of pi at the token's position, nats, with gradient; needed when
            `algorithm.entropy_coef` > 0.
        old_T: log pi_old; None: pi_old is pi (the first update of a step).
        reference_T: Log-probs of the reference policy; needed when `algorithm.kl_in` is loss and
            `algorithm.kl_coef` > 0.
    """

    logprobs_T: torch.Tensor
    behaviour_T: torch.Tensor
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    sequence_T: torch.Tensor
    entropy_T: torch.Tensor | None = None
    old_T: torch.Tensor | None = None
    reference_T: torch.Tensor | None = None

    @property
    def mask_T(self) -> torch.Tensor:
        """[T] bool, True where the token takes part."""
        return self.weight_T > 0

    def masked(self) -> LossInputs:
        """The same with zeros in place of all that is masked out.

        Masked before anything is computed: 0 * inf and 0 * nan are nan in the backward pass.
        """
        mask_T = self.mask_T

        def clean(values_T: torch.Tensor) -> torch.Tensor:
            return torch.where(mask_T, values_T, 0.0)

        return replace(
            self,
            logprobs_T=clean(self.logprobs_T),
            behaviour_T=clean(self.behaviour_T),
            advantage_T=clean(self.advantage_T),
            entropy_T=None if self.entropy_T is None else clean(self.entropy_T),
            old_T=None if self.old_T is None else clean(self.old_T),
            reference_T=None if self.reference_T is None else clean(self.reference_T),
        )


@dataclass(frozen=True)
class LossStats:
    """What forward passes saw, as sums over tokens and one maximum, so that parts pool exactly.

    Attributes:
        tokens: Tokens that took part.
        loss: Their part of the loss.
        clipped: Tokens whose gradient the objective bounds or takes away.
        entropy: Of pi, nats.
        k3: exp(d) - 1 - d with d = log pi_old - log mu, nats: estimates KL(mu || pi_old) on the
            engine's own samples (http://joschu.net/blog/kl-approx.html).
        log_ratio_abs_max: The largest |d|, nats.
        engine_ratio: exp(d), before any correction.
        corrected: Tokens whose weight the correction capped or took away.
        kl: k3 of pi against its reference, nats.
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


def policy_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[torch.Tensor, LossStats]:
    """The loss of some of the tokens of an optimizer step.

    loss = -sum_t weight_t * (w_t * (keep_t * objective_t - kl_coef * kl_t) + entropy_coef * H_t)

    with w from `engine_weights`, keep from `negative_mask`, the objective from `token_objective`
    and kl from `kl_penalty`. With `algorithm.anchor` = learner the ratio is pi / pi_old, and w
    corrects the engine's mismatch; with engine it is pi / mu, which holds the mismatch already.
    `algorithm.objective` = cross_entropy uses none of these, see `cross_entropy_loss`.

    Returns:
        (scalar loss with gradient, its statistics).

    Raises:
        ValueError: Reference log-probs or entropies are needed and missing.
    """
    if algorithm.objective == "cross_entropy":
        return cross_entropy_loss(inputs)
    mask_T, inputs = inputs.mask_T, inputs.masked()
    logprobs_T, behaviour_T = inputs.logprobs_T, inputs.behaviour_T
    advantage_T, weight_T, sequence_T = inputs.advantage_T, inputs.weight_T, inputs.sequence_T
    now_T = logprobs_T.detach()
    old_T = now_T if inputs.old_T is None else inputs.old_T
    log_ratio_T = logprobs_T - (behaviour_T if algorithm.anchor == "engine" else old_T)
    scored_T = log_ratio_T
    if algorithm.ratio == "sequence":
        # GSPO (arXiv 2507.18071): the geometric mean of the ratios, for every token of a sequence.
        scored_T = sequence_means(log_ratio_T, sequence_T, mask_T)
    objective_T, clipped_T = token_objective(logprobs_T, scored_T, advantage_T, algorithm)
    mismatch_T = old_T - behaviour_T
    correction_T = engine_weights(mismatch_T, sequence_T, mask_T, algorithm)
    kept_T = negative_mask(now_T - behaviour_T, advantage_T, sequence_T, mask_T, algorithm)
    objective_T = objective_T * kept_T
    if algorithm.kl_coef > 0 and algorithm.kl_in == "loss":
        if inputs.reference_T is None:
            raise ValueError("algorithm.kl_coef > 0 needs the reference policy's log-probs")
        penalty_T = kl_penalty(logprobs_T, inputs.reference_T, log_ratio_T, algorithm.kl_estimator)
        objective_T = objective_T - algorithm.kl_coef * penalty_T
    loss = -(weight_T * correction_T * objective_T).sum()
    if algorithm.entropy_coef > 0:
        if inputs.entropy_T is None:
            raise ValueError("algorithm.entropy_coef > 0 needs the entropies")
        loss = loss - algorithm.entropy_coef * (weight_T * inputs.entropy_T).sum()

    with torch.no_grad():
        w_T = bounded_exp(mismatch_T)
        kl = 0.0
        if inputs.reference_T is not None:
            d_T = (now_T - inputs.reference_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl = float(((-d_T).exp() - 1.0 + d_T).sum())
        changed_T = (correction_T != (w_T if algorithm.correction != "off" else 1.0)) | ~kept_T
        stats = LossStats(
            tokens=int(mask_T.sum()),
            loss=float(loss),
            clipped=float((clipped_T & mask_T).sum()),
            entropy=0.0 if inputs.entropy_T is None else float(inputs.entropy_T.sum()),
            k3=float((w_T - 1.0 - mismatch_T).sum()),
            log_ratio_abs_max=float(mismatch_T.abs().max()) if mismatch_T.numel() else 0.0,
            engine_ratio=float((w_T * mask_T).sum()),
            corrected=float((changed_T & mask_T).sum()),
            kl=kl,
        )
    return loss, stats


def cross_entropy_loss(inputs: LossInputs) -> tuple[torch.Tensor, LossStats]:
    """-sum_t weight_t * log pi_t over tokens of demonstrations.

    With the weights of `token_weights(..., "token", ...)` and all tokens of the step it is the mean
    negative log-likelihood, in nats per token. No engine sampled these tokens: the statistics that
    compare with an engine report no difference.

    Returns:
        (scalar loss with gradient, its statistics).
    """
    mask_T, inputs = inputs.mask_T, inputs.masked()
    loss = -(inputs.weight_T * inputs.logprobs_T).sum()
    tokens = int(mask_T.sum())
    entropy = 0.0 if inputs.entropy_T is None else float(inputs.entropy_T.detach().sum())
    return loss, LossStats(
        tokens=tokens, loss=float(loss.detach()), entropy=entropy, engine_ratio=float(tokens)
    )
