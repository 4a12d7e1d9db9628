"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

A layer's weight is W + s B A, of which A [R, in] and B [out, R] are trained; s = alpha / rank, and
B begins as zeros. The layer multiplies by this sum in the model's precision, number for number what
is published to the engines. W x + s B (A x), the usual form, is another policy than the one that
engines sample from: in bfloat16 the merged weights lose all of an update that is small beside W.
Gradients are those of the sum before it is rounded, as with float32 master weights; that of the
whole weight is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from cohort.learner.lora_config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 12


def merge(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool
) -> torch.Tensor:
    """W + s B A, added in float32 or more and rounded once, in W's dtype.

    Args:
        weight: [out, in], or [in, out] when transposed.
        a: [R, in].
        b: [out, R].
        scale: s.
        transposed: As GPT-2's layers have it.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    delta = (b.to(exact) @ a.to(exact)).mul_(scale)
    return (delta.t() if transposed else delta).add_(weight).to(weight.dtype)


class LoraProduct(torch.autograd.Function):
    """y = x M^T + bias with M = W + s B A. With g = dL/dy: dx = g M, dA = s (g B)^T x and
    dB = s g^T (x A^T). M lives while its product is computed, in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.transposed = scale, transposed
        return product(x, merge(weight, a, b, scale, transposed), bias, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, flat = (t.reshape(-1, t.shape[-1]) for t in (gradient, x))
        dx = None
        if ctx.needs_input_grad[0]:
            merged = merge(weight, a, b, ctx.scale, ctx.transposed)
            dx = (g @ (merged.t() if ctx.transposed else merged)).view(x.shape)
        da = ((g @ b).mul_(ctx.scale).t() @ flat) if ctx.needs_input_grad[3] else None
        db = (g.t() @ (flat @ a.t()).mul_(ctx.scale)) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None, None


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """x W^T + bias.

    Args:
        x: [..., in].
        weight: [out, in]; [in, out] when transposed.
        bias: [out], or None.
        transposed: Whether the weight lies as GPT-2's.

    Returns:
        [..., out].
    """
    flat, across = x.reshape(-1, x.shape[-1]), weight if transposed else weight.t()
    y = flat @ across if bias is None else torch.addmm(bias, flat, across)
    return y.view(*x.shape[:-1], y.shape[-1])


class LoraLayer(nn.Module):
    """A linear layer with its adapter. The frozen parameters keep their names.

    Args:
        layer: A `Linear`, or GPT-2's `Conv1D`; whole.
        lora: Rank and scale.
        generator: Draws A, on the CPU: all ranks draw the same.

    Attributes:
        reference: A and B of the reference policy; None: it is the frozen layer alone.
        as_reference: Whether it computes as the reference policy.
    """

    def __init__(self, layer: nn.Module, lora: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = layer.get_parameter("weight")
        self.bias = dict(layer.named_parameters()).get("bias")
        self.transposed = not isinstance(layer, nn.Linear)
        self.scale = lora.scale
        self.out_features, self.in_features = sides(layer)
        # As PEFT and torch's Linear begin: uniform with this bound.
        a = torch.rand(lora.rank, self.in_features, generator=generator)
        a = (2 * a - 1) * self.in_features**-0.5
        self.lora_A = nn.Parameter(a.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, lora.rank))
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None
        self.as_reference = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.as_reference:
            weight: torch.Tensor = self.weight
            if self.reference is not None:
                weight = merge(weight, *self.reference, self.scale, self.transposed)
            return product(x, weight, self.bias, self.transposed)
        found: torch.Tensor = LoraProduct.apply(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.transposed
        )
        return found

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The weight that the layer computes with, in the shape of `weight`."""
        return merge(self.weight, self.lora_A, self.lora_B, self.scale, self.transposed)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with adapters, by name; none without `model.lora`."""
    return {name: x for name, x in model.named_modules() if isinstance(x, LoraLayer)}


@contextmanager
def reference_policy(model: nn.Module) -> Iterator[None]:
    """A block in which the model is the reference policy: adapters off, or those of a refresh."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.as_reference = True
    try:
        yield
    finally:
        for layer in layers:
            layer.as_reference = False


def sides(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    first, second = layer.get_parameter("weight").shape
    return (first, second) if isinstance(layer, nn.Linear) else (second, first)


def chosen_layers(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Module]:
    """The linear layers that get an adapter, by name; the model may be on the meta device.

    Raises:
        UnsupportedModel: A target names no linear layer, or one whose weight others share.
    """
    from transformers.pytorch_utils import Conv1D

    kind = type(model).__name__
    linear = {n: x for n, x in model.named_modules() if isinstance(x, nn.Linear | Conv1D)}
    if lora.targets:
        if absent := [t for t in lora.targets if not any(_fits(name, t) for name in linear)]:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            more = ", ..." if len(ends) > SHOWN else ""
            raise UnsupportedModel(
                f"model.lora.targets: {kind} has no linear layer {', '.join(absent)}; it has "
                f"{', '.join(ends[:SHOWN])}{more}"
            )
        chosen = {n: x for n, x in linear.items() if any(_fits(n, t) for t in lora.targets)}
    else:
        output = model.get_output_embeddings()
        chosen = {name: layer for name, layer in linear.items() if layer is not output}
    if not chosen:
        raise UnsupportedModel(f"model.lora: {kind} has no linear layer beside its output layer")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        others = names[id(layer.get_parameter("weight"))]
        if len(others) > 1:
            raise UnsupportedModel(
                f"model.lora.targets: {name} has no weights of its own ({' and '.join(others)} are "
                "one): leave it out"
            )
    return chosen


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_shapes(model: PreTrainedModel, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The trained tensors of a model that has no adapters yet, and their shapes."""
    found = {}
    for name, layer in chosen_layers(model, lora).items():
        outputs, inputs = sides(layer)
        found[f"{name}.lora_A"] = (lora.rank, inputs)
        found[f"{name}.lora_B"] = (outputs, lora.rank)
    return found


def add_adapters(policy: PolicyModel, lora: LoraConfig, seed: int) -> None:
    """Freeze a policy and put adapters beside its layers, in place.

    From then on the policy's own state dict, which DeepSpeed saves, lacks what is frozen: it comes
    from the model folder again. That of the model inside has everything.

    Args:
        policy: Whole, on its device.
        lora: Rank, scale and targets.
        seed: The same on all ranks.

    Raises:
        UnsupportedModel: As `chosen_layers` does.
    """
    model = policy.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in chosen_layers(model, lora).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLayer(layer, lora, generator))
    frozen = {
        name
        for name, tensor in policy.state_dict(keep_vars=True).items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
        for name in frozen:
            # A tied parameter is there under each of its names.
            state.pop(f"{prefix}{name}", None)

    policy.register_state_dict_post_hook(leave_out)


def take_trained(src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
    """Load what such a state dict has; ValueError unless it has all of it, and nothing else."""
    if different := sorted(src.keys() ^ dst.state_dict().keys()):
        raise ValueError(f"the checkpoint has other adapters (model.lora): {different[0]}")
    dst.load_state_dict(src, strict=False)
