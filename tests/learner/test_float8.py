"""Linear layers in float8, emulated, against products of tensors rounded by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cohort.learner.float8 import convert, stays_high
from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from tests.learner.helpers import tiny_model

CPU = torch.device("cpu")
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(32, 48, bias=False)
        self.head = nn.Linear(48, 64, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def rounded(x: torch.Tensor, dtype: torch.dtype, rows: bool) -> torch.Tensor:
    """x as float8 sees it: scaled to the largest value of the type, rounded, scaled back.

    Scales of rows are powers of two.
    """
    peak = x.abs().amax(-1, keepdim=True) if rows else x.abs().amax()
    scale = (LARGEST[dtype] / peak.double()).float()
    if rows:
        scale = scale.log2().floor().exp2()
    return (x * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).float() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_all_three_products_are_rounded(recipe: str) -> None:
    model = OneLayer()
    weight = model.inner.weight.detach().clone()
    assert convert(model, recipe, CPU) == 1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 32, generator=generator).requires_grad_()
    slope = torch.randn(16, 48, generator=generator) * 1e-3
    y = model.inner(x)
    (y * slope).sum().backward()

    rows, e4m3 = recipe == "rowwise", torch.float8_e4m3fn
    backward = e4m3 if rows else torch.float8_e5m2
    x8, w8 = rounded(x.detach(), e4m3, rows), rounded(weight, e4m3, rows)
    torch.testing.assert_close(y.detach(), x8 @ w8.T, rtol=1e-4, atol=1e-5)
    assert float((y.detach() - x.detach() @ weight.T).abs().max()) > 1e-3
    g8 = rounded(slope, backward, rows)
    across = rounded(weight.T.contiguous(), e4m3, rows).T
    torch.testing.assert_close(x.grad, g8 @ across, rtol=1e-4, atol=1e-7)
    # Rows of the third product run along the tokens.
    g8_t = rounded(slope.T.contiguous(), backward, rows)
    x8_t = rounded(x.detach().T.contiguous(), e4m3, rows)
    torch.testing.assert_close(model.inner.weight.grad, g8_t @ x8_t.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-untied", "qwen3-tied", "gemma"])
def test_only_inner_layers_are_converted(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert convert(model, "rowwise", CPU) == len([n for n in linear if n != "lm_head"])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert type(model.get_output_embeddings()) is nn.Linear
    PolicyModel(model)


def test_what_stays_high() -> None:
    model = OneLayer()
    assert stays_high(model, "head", model.head)
    assert stays_high(model, "layers.0.mlp.gate", nn.Linear(32, 16))
    assert stays_high(model, "layers.0.up", nn.Linear(32, 40))
    assert stays_high(model, "layers.0.up", nn.Linear(24, 32))
    assert not stays_high(model, "layers.0.mlp.gate_proj", nn.Linear(32, 16))


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"learner\.float8=rowwise: GPT2LMHeadModel has no"):
        convert(tiny_model("gpt2"), "rowwise", CPU)
