"""Log-probabilities and entropies from the logits, without float32 copies of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Tokens whose float32 logits exist at one time on a CPU: what its caches hold. A GPU takes all
# tokens at once: it waits for the launch of every operation on a block of these.
SCORE_BLOCK = 32


@dataclass(frozen=True)
class LogitScale:
    """What a model does to the outputs x of its last layer.

    cap * tanh(factor * x / cap), or factor * x without a cap.
    """

    factor: float = 1.0
    cap: float | None = None

    def apply_(self, x: torch.Tensor) -> torch.Tensor:
        """Scale in place."""
        if self.factor != 1.0:
            x.mul_(self.factor)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def multiply_by_slope_(self, gradient: torch.Tensor, scaled: torch.Tensor) -> None:
        """Turn a gradient by the scaled values into one by the unscaled, in place."""
        if self.factor != 1.0:
            gradient.mul_(self.factor)
        if self.cap is not None:
            gradient.mul_(1.0 - (scaled / self.cap) ** 2)


class TokenScores(torch.autograd.Function):
    """Log-probs and entropies from the output layer, a few tokens at a time.

    Autograd would keep several float32 copies of [N, V] and pass over them. Here only the model's
    own outputs are kept; intermediate values share two small buffers.

    With z = scale(outputs) / temperature and p = softmax(z): d logprob / dz = onehot(target) - p,
    d entropy / dz = -p (log p + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs_PV: torch.Tensor,
        target_N: torch.Tensor,
        scale: LogitScale,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of target_N and entropies, in nats.

        Args:
            ctx: Autograd's.
            outputs_PV: Of the output layer; those beyond N are padding.
            target_N: int64.
            scale: What the model does to the outputs.
            temperature: Logits are divided by it.

        Returns:
            ([N] float32, [N] float32).
        """
        logprobs_N = torch.empty(len(target_N), device=outputs_PV.device)
        normaliser_N, entropy_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        block = _block_size(outputs_PV)
        buffers = [_buffer(outputs_PV, block), _buffer(outputs_PV, block)]
        for part in _blocks(len(target_N), block):
            z, exp = (buffer[: len(target_N[part])] for buffer in buffers)
            scale.apply_(z.copy_(outputs_PV[part])).div_(temperature)
            peak = z.amax(-1)
            z.sub_(peak[:, None])
            total = torch.exp(z, out=exp).sum(-1)
            log_total = total.log()
            logprobs_N[part] = z.gather(1, target_N[part, None])[:, 0] - log_total
            normaliser_N[part] = peak + log_total
            entropy_N[part] = log_total - exp.mul_(z).sum(-1) / total
        ctx.save_for_backward(outputs_PV, target_N, normaliser_N, entropy_N)
        ctx.scale, ctx.temperature = scale, temperature
        # Entropies are mostly only looked at: then their gradient is None, not zeros.
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, gradient_N: torch.Tensor | None, entropy_gradient_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        outputs_PV, target_N, normaliser_N, entropy_N = ctx.saved_tensors
        if gradient_N is None:
            gradient_N = torch.zeros_like(normaliser_N)
        result_PV = torch.empty_like(outputs_PV)
        result_PV[len(target_N) :] = 0.0
        block = _block_size(outputs_PV)
        buffer = _buffer(outputs_PV, block)
        for part in _blocks(len(target_N), block):
            z = buffer[: len(target_N[part])]
            ctx.scale.apply_(z.copy_(outputs_PV[part]))
            scaled = z.clone() if ctx.scale.cap is not None else z
            g = gradient_N[part, None]
            z.div_(ctx.temperature).sub_(normaliser_N[part, None])
            factor = g
            if entropy_gradient_N is not None:
                factor = (z + entropy_N[part, None]).mul_(entropy_gradient_N[part, None]).add_(g)
            # From here on z holds the gradient.
            z.exp_().mul_(factor).neg_()
            z.scatter_add_(1, target_N[part, None], g)
            ctx.scale.multiply_by_slope_(z, scaled)
            result_PV[part] = z.div_(ctx.temperature)
        return result_PV, None, None, None


def _block_size(outputs_PV: torch.Tensor) -> int:
    """Tokens that are scored together."""
    return SCORE_BLOCK if outputs_PV.is_cpu else max(1, len(outputs_PV))


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _buffer(outputs_PV: torch.Tensor, block: int) -> torch.Tensor:
    rows = min(block, len(outputs_PV))
    return torch.empty(rows, outputs_PV.shape[1], device=outputs_PV.device)
