"""Norms in blocks are the models' own norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cohort.learner import norm
from cohort.learner.norm import RootMeanSquareNorm, use_blocks
from tests.learner.helpers import tiny_model


def pair(
    dtype: torch.dtype, *shape: int
) -> tuple[LlamaRMSNorm, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = LlamaRMSNorm(shape[-1], eps=1e-3)
    module.weight.data.normal_()
    x, dy = torch.randn(shape) * 3, torch.randn(shape)
    return module.to(dtype), x.to(dtype).requires_grad_(), x.to(dtype), dy.to(dtype)


def gradients(y: torch.Tensor, dy: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return [gradient.float() for gradient in torch.autograd.grad(y, of, dy)]


@pytest.mark.parametrize("shape", [(1, 50, 24), (3, 5, 4, 8), (1, 16)])
def test_values_and_gradients_are_those_of_autograd(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "BLOCK", 100)  # several blocks, the last one short
    module, x, before, dy = pair(torch.float32, *shape)
    weight = module.weight
    y = RootMeanSquareNorm.apply(x, weight, module.variance_epsilon)
    assert torch.equal(y, module(x))
    for ours, theirs in zip(
        gradients(y, dy, x, weight), gradients(module(x), dy, x, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before), "the input must stay as it is"


def test_bfloat16_is_as_exact_as_autograd() -> None:
    module, x, _, dy = pair(torch.bfloat16, 200, 64)
    y = RootMeanSquareNorm.apply(x, module.weight, module.variance_epsilon)
    assert torch.equal(y, module(x))
    exact = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    # Llama's norm computes in float32 whatever comes in.
    n = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + exact.variance_epsilon)
    right = gradients(exact.weight * n, dy.double(), x64, exact.weight)
    ours = gradients(y, dy, x, module.weight)
    theirs = gradients(module(x), dy, x, module.weight)
    for a, b, c in zip(ours, theirs, right, strict=True):
        assert (a - c).norm() <= (b - c).norm()
        assert (a - c).norm() < 4e-3 * c.norm()


@pytest.mark.parametrize(
    ("kind", "norms"), [("llama-tied", 5), ("qwen2-untied", 5), ("gpt2", 0), ("gemma2", 0)]
)
def test_only_the_same_norms_are_changed(kind: str, norms: int) -> None:
    """Two layers of two, and the last; Gemma multiplies by 1 + w, GPT-2 subtracts the mean."""
    model = tiny_model(kind)
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    assert use_blocks(model) == norms
    assert use_blocks(model) == 0
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_a_copy_has_weights_of_its_own() -> None:
    model = tiny_model("llama-tied")
    use_blocks(model)
    other = copy.deepcopy(model)
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    with torch.no_grad():
        other.model.norm.weight.mul_(2.0)
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(other(ids).logits, before)


def test_norms_with_a_gate_stay() -> None:
    class Gated(LlamaRMSNorm):
        def forward(
            self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
        ) -> torch.Tensor:
            return super().forward(hidden_states if gate is None else hidden_states * gate)

    assert use_blocks(nn.ModuleList([Gated(8)])) == 0
    assert use_blocks(nn.ModuleList([LlamaRMSNorm(8)])) == 1


def test_other_dtypes_than_the_weight_take_the_models_own_way() -> None:
    module = LlamaRMSNorm(8)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    before = module(x)
    use_blocks(nn.ModuleList([module]))
    assert torch.equal(module(x), before)
