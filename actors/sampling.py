"""Sampling for engines on CPUs: one random number a token instead of one a vocabulary entry.

vLLM draws noise for every entry of the vocabulary (Gumbel-max). Inverse transform sampling
(Devroye, Non-Uniform Random Variate Generation, 1986, section III.2) needs one uniform number a
sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler


def tokens_at(probabilities_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """[B] int64: of each row, the entry in which its distribution function passes uniform.

    Entries of probability 0 are never chosen. In float64, for float32 could not tell apart entries
    less probable than 6e-8.

    Args:
        probabilities_BV: [B, V]; rows need not add up to 1.
        uniform_B: [B] float64 in [0, 1).
    """
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    chosen_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
    # Only in a row of nan is no such entry: its log-prob will say so.
    return chosen_B.clamp_(max=probabilities_BV.shape[-1] - 1)


def uniforms(size: int, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """[size] float64 in [0, 1), those of seeded rows from their own generators."""
    uniform_B = torch.rand(size, dtype=torch.float64)
    for row, generator in generators.items():
        uniform_B[row] = torch.rand((), dtype=torch.float64, generator=generator)
    return uniform_B


def use_in_vllm() -> None:
    """Make the samplers that vLLM builds from now on in this process, on CPUs, use this."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    def forward_cpu(
        self: TopKTopPSampler,
        logits_BV: torch.Tensor,
        generators: dict[int, torch.Generator],
        k_B: torch.Tensor | None,
        p_B: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits_BV = apply_top_k_top_p(logits_BV, k_B, p_B)
        returned_BV = None
        if self.logprobs_mode == "processed_logits":
            returned_BV = logits_BV
        elif self.logprobs_mode == "processed_logprobs":
            returned_BV = logits_BV.log_softmax(-1, dtype=torch.float32)
        uniform_B = uniforms(len(logits_BV), generators)
        return tokens_at(logits_BV.softmax(-1, dtype=torch.float32), uniform_B), returned_BV

    TopKTopPSampler.forward_cpu = forward_cpu
