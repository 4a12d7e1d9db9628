"""Log-probabilities and entropies from the logits, without float32 copies of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled values."""
        x = x if self.factor == 1.0 else x * self.factor
        return x if self.cap is None else (x / self.cap).tanh() * self.cap

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
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of target_N and entropies, in nats.

        Args:
            ctx: Autograd's.
            outputs_PV: Of the output layer; those beyond N are padding.
            target_N: int64.
            scale: What the model does to the outputs.
            temperature: Logits are divided by it.
            fused: Compile both directions: a pass over the outputs each, and nothing but a
                gradient as large as they are.

        Returns:
            ([N] float32, [N] float32).
        """
        if fused:
            # Not a part of a longer tensor: another kind of argument for the compiler.
            target_N = target_N.clone()
            logprobs_N, entropy_N, normaliser_N = _compiled(fused_forward)(
                _any_length(outputs_PV), _any_length(target_N), scale, temperature
            )
            _keep(ctx, (outputs_PV, target_N, normaliser_N, entropy_N), scale, temperature, fused)
            return logprobs_N, entropy_N
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
        _keep(ctx, (outputs_PV, target_N, normaliser_N, entropy_N), scale, temperature, fused)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, gradient_N: torch.Tensor | None, entropy_gradient_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None, None]:
        outputs_PV, target_N, normaliser_N, entropy_N = ctx.saved_tensors
        if gradient_N is None:
            gradient_N = torch.zeros_like(normaliser_N)
        if ctx.fused:
            gradients = (gradient_N, entropy_gradient_N)
            found_PV = _compiled(fused_backward)(
                *map(_any_length, (outputs_PV, target_N, normaliser_N, entropy_N)),
                *(None if x is None else _any_length(x.clone()) for x in gradients),
                ctx.scale,
                ctx.temperature,
            )
            return found_PV, None, None, None, None
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
        return result_PV, None, None, None, None


def _keep(
    ctx: Any,
    tensors: tuple[torch.Tensor, ...],
    scale: LogitScale,
    temperature: float,
    fused: bool,
) -> None:
    """What the backward pass needs."""
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.temperature, ctx.fused = scale, temperature, fused
    # Entropies are mostly only looked at: then their gradient is None, not zeros.
    ctx.set_materialize_grads(False)


def fused_forward(
    outputs_PV: torch.Tensor, target_N: torch.Tensor, scale: LogitScale, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies, normalisers, [N] float32: `TokenScores.forward` to be compiled."""
    z = scale.of(outputs_PV[: len(target_N)].float()) / temperature
    peak = z.amax(-1, keepdim=True)
    z = z - peak
    exp = z.exp()
    total = exp.sum(-1)
    log_total = total.log()
    logprobs_N = z.gather(1, target_N[:, None])[:, 0] - log_total
    return logprobs_N, log_total - (exp * z).sum(-1) / total, peak[:, 0] + log_total


def fused_backward(
    outputs_PV: torch.Tensor,
    target_N: torch.Tensor,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    gradient_N: torch.Tensor,
    entropy_gradient_N: torch.Tensor | None,
    scale: LogitScale,
    temperature: float,
) -> torch.Tensor:
    """[P, V] as the outputs: `TokenScores.backward` to be compiled."""
    scaled = scale.of(outputs_PV[: len(target_N)].float())
    z = scaled / temperature - normaliser_N[:, None]
    factor = gradient_N[:, None]
    if entropy_gradient_N is not None:
        factor = factor + (z + entropy_N[:, None]) * entropy_gradient_N[:, None]
    chosen = torch.arange(z.shape[1], device=z.device) == target_N[:, None]
    gradient = torch.where(chosen, gradient_N[:, None], 0.0) - z.exp() * factor
    slope = scale.factor / temperature
    if scale.cap is not None:
        gradient = gradient * (1.0 - (scaled / scale.cap) ** 2)
    padding = (0, 0, 0, len(outputs_PV) - len(target_N))
    return nn.functional.pad((gradient * slope).to(outputs_PV.dtype), padding)


@functools.cache
def _compiled(body: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(body)


def _any_length(x: torch.Tensor) -> torch.Tensor:
    """One kernel for all numbers of tokens; that of words stays a number in it."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _block_size(outputs_PV: torch.Tensor) -> int:
    """Tokens that are scored together."""
    return SCORE_BLOCK if outputs_PV.is_cpu else max(1, len(outputs_PV))


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _buffer(outputs_PV: torch.Tensor, block: int) -> torch.Tensor:
    rows = min(block, len(outputs_PV))
    return torch.empty(rows, outputs_PV.shape[1], device=outputs_PV.device)
