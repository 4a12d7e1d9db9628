"""Training with float8 matrix products, through torchao.

Of every converted linear layer all three products (output, gradient of the input, gradient of the
weight) take float8 operands that are scaled as they come (Micikevicius et al. 2022, arXiv
2209.05433). tensorwise: one scale a tensor; e4m3, for gradients e5m2. rowwise: one scale a row, a
power of two; e4m3. The weights themselves, master weights, gradients and optimizer state keep their
precision, and so does what is published.

Kept out of it, as DeepSeek-V3 does (arXiv 2412.19437, section 3.3): the output layer, embeddings,
norms, attention products and the routers of experts; also layers with a side that is no multiple
of 16, which the hardware cannot take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from cohort.learner.logprobs import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Recipe = Literal["tensorwise", "rowwise"]
ROUTERS = ("gate", "router")
SIDE_MULTIPLE = 16
# Hopper and Ada are the first with float8 products.
MINIMUM_CAPABILITY = (8, 9)


def stays_high(model: PreTrainedModel, name: str, layer: nn.Linear) -> bool:
    """Whether a linear layer keeps its precision."""
    return (
        layer is model.get_output_embeddings()
        or name.rpartition(".")[2] in ROUTERS
        or layer.in_features % SIDE_MULTIPLE != 0
        or layer.out_features % SIDE_MULTIPLE != 0
    )


def convert(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> int:
    """Turn a model's linear layers into float8 ones, in place.

    Parameters stay the same tensors under the same names. On CPUs the products are emulated:
    rounded to float8, multiplied in float32.

    Returns:
        How many layers were converted.

    Raises:
        UnsupportedModel: torchao is missing, the GPU has no float8, or no layer of the model can be
            converted.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise UnsupportedModel(
            f"learner.float8={recipe} needs the package torchao: pip install torchao, or use off"
        ) from error

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            raise UnsupportedModel(
                f"learner.float8={recipe}: this GPU has compute capability "
                f"{'.'.join(map(str, capability))}, float8 needs 8.9 or more; use off"
            )
    chosen = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not stays_high(model, name, layer)
    }
    if not chosen:
        raise UnsupportedModel(
            f"learner.float8={recipe}: {type(model).__name__} has no linear layer that can be "
            f"float8 (sides that are multiples of {SIDE_MULTIPLE}, not the output layer); use off"
        )
    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(
        model,
        config=replace(config, emulate=device.type == "cpu"),
        module_filter_fn=lambda _, name: name in chosen,
    )
    return len(chosen)
