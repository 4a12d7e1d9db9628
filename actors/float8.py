"""What float8 rollouts do to a model, on CPUs whose instructions know no float8.

Importing this module makes vLLM know the quantization EMULATED. As vLLM's own fp8 on GPUs: the
weights of linear layers are rounded to e4m3 with one scale for a tensor whenever they are loaded,
so at every weight update too; activations with one scale for a token, as they come. Embeddings and
the output layer stay as they are. The products are those of the engine's precision: this is for
trying out what rounding does to training, not for speed.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

EMULATED = "cohort_fp8"
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(x: torch.Tensor, by_row: bool) -> torch.Tensor:
    """x scaled to the range of e4m3, rounded to it, and scaled back; one scale, or one a row."""
    peak = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    scale = peak.float().clamp(min=1e-12) / LARGEST
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class _Float8Linear(UnquantizedLinearMethod):
    # Without rounding first, the weights would not be what this method stands for.
    supports_pre_processed_weights = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.get_parameter("weight").data
        weight.copy_(rounded(weight, by_row=False))
        super().process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().apply(layer, rounded(x, by_row=True), bias)


@register_quantization_config(EMULATED)
class EmulatedFloat8(QuantizationConfig):
    """vLLM's description of the method."""

    def get_name(self) -> str:
        return EMULATED

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, object]) -> EmulatedFloat8:
        del config
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> _Float8Linear | None:
        del prefix
        return _Float8Linear() if isinstance(layer, LinearBase) else None
