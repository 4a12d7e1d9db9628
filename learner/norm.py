"""Root-mean-square norms on CPUs, block by block instead of in passes over whole tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

# Numbers whose float32 intermediates exist at one time: few enough for a core's cache, many enough
# that both cores have work.
BLOCK = 2**19


class RootMeanSquareNorm(torch.autograd.Function):
    """y = w * (x / rms(x)), rms(x) = sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, 1910.07467).

    Rounds where transformers' Llama norm does: x / rms(x) is computed in float32 and rounded to the
    dtype of x before the product with w. Autograd would keep and walk several float32 copies of
    [N, H]; here x and N float32 numbers are kept. With n = x / rms(x) and h = dy * w,
    dx = (h - n mean(h n)) / rms(x) and dw is the sum of dy * n over rows, both in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """The normed vectors.

        Args:
            ctx: Of autograd.
            x: [..., H].
            weight_H: [H], of x's dtype.
            eps: Added to the mean square.

        Returns:
            [..., H] in x's dtype.
        """
        x_NH = x.reshape(-1, x.shape[-1])
        y_NH = torch.empty_like(x_NH)
        scale_N1 = x_NH.new_empty(len(x_NH), 1, dtype=torch.float32)
        for part in _parts(x_NH):
            block = x_NH[part].to(torch.float32, copy=True)
            mean_square = block.pow(2).mean(-1, keepdim=True)
            torch.rsqrt(mean_square.add_(eps), out=scale_N1[part])
            torch.mul(block.mul_(scale_N1[part]).to(x.dtype), weight_H, out=y_NH[part])
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        return y_NH.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        dy_NH = dy.reshape(x_NH.shape)
        dx_NH = torch.empty_like(x_NH)
        dw_H = torch.zeros_like(weight_H, dtype=torch.float32)
        for part in _parts(x_NH):
            h = dy_NH[part].to(torch.float32, copy=True)
            n = x_NH[part].to(torch.float32, copy=True).mul_(scale_N1[part])
            dw_H += (h * n).sum(0)
            h.mul_(weight_H)
            mean = torch.linalg.vecdot(h, n).div_(x_NH.shape[-1])[:, None]
            dx_NH[part] = h.addcmul_(n, mean, value=-1.0).mul_(scale_N1[part])
        return dx_NH.view(dy.shape), dw_H.to(weight_H.dtype), None


def _parts(x_NH: torch.Tensor) -> list[slice]:
    rows = max(1, BLOCK // x_NH.shape[1])
    return [slice(i, i + rows) for i in range(0, len(x_NH), rows)]


def use_blocks(model: nn.Module) -> int:
    """Replace every norm of `model` that equals this one to the bit, for its use on CPUs.

    Others (Gemma's, which multiplies by 1 + w) stay as they are. Weights must be whole; they may be
    on any device.

    Returns:
        How many norms were replaced.
    """
    blocked: dict[type, type] = {}
    changed = 0
    for module in model.modules():
        kind = type(module)
        if _is_this_norm(module):
            if kind not in blocked:
                blocked[kind] = type(f"Blocked{kind.__name__}", (_Blocked, kind), {})
            # The class and not the object's `forward`: a copy of the model has weights of its own.
            module.__class__ = blocked[kind]
            changed += 1
    return changed


class _Blocked(nn.Module):
    """A replaced norm; it computes what it did before wherever the blocks gain nothing."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A compiler fuses the model's own.
        here = hidden_states.is_cpu and not torch.compiler.is_compiling()
        if here and hidden_states.dtype == self.weight.dtype:
            return RootMeanSquareNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def _is_this_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that this file computes, found by trying it."""
    names = [name for name, _ in module.named_parameters()]
    eps = vars(module).get("variance_epsilon")
    if isinstance(module, _Blocked) or names != ["weight"] or not isinstance(eps, float):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False  # Mamba's takes a gate as well.
    weight = module.get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, len(weight), generator=generator).mul_(3).to(weight)
    with torch.no_grad():
        return torch.equal(module(x), RootMeanSquareNorm.apply(x, weight, eps))
