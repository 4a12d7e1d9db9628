"""An adapter as a folder in PEFT's format: read and written.

Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint. A layer's tensors are called
`base_model.model.LAYER.lora_A.weight` and `lora_B.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from cohort.learner.checkpoint import CheckpointError
from cohort.learner.lora import lora_layers
from cohort.learner.lora_config import LoraConfig
from cohort.learner.state import RankState
from cohort.learner.weights import gather_adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# In the file's metadata: a digest of the model that the adapter belongs to.
BASE = "cohort_base"
# Variants of LoRA that are computed otherwise.
VARIANTS = ("use_dora", "use_rslora", "alora_invocation_tokens", "rank_pattern", "alpha_pattern")


def peft_name(name: str) -> str:
    """PEFT's name of a trained tensor.

    >>> peft_name("model.layers.0.mlp.up_proj.lora_A")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"{PREFIX}{name}.weight"


def whole_adapter(state: RankState) -> dict[str, torch.Tensor]:
    """Rank 0: a copy of all adapters, by PEFT's names; all ranks take part."""
    found = {}
    for name, a, b in gather_adapters(state.model, state.spec.learner.zero_stage):
        if state.spec.rank == 0:
            for part, tensor in (("lora_A", a), ("lora_B", b)):
                found[peft_name(f"{name}.{part}")] = tensor.to("cpu", copy=True)
    return found


def write_adapter(state: RankState, adapter: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write a folder that PEFT and engines load beside the model.

    Args:
        state: Of rank 0.
        adapter: What `whole_adapter` gave.
        target: The folder; made if needed.
    """
    from safetensors.torch import save_file

    lora = state.spec.lora
    assert lora is not None, "there is an adapter"
    layers = lora_layers(state.model)
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": state.spec.model_path,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": lora.targets or sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    target.mkdir(parents=True, exist_ok=True)
    base = f"{state.base} {state.spec.dtype}"
    save_file(dict(adapter), target / TENSORS, metadata={"format": "pt", BASE: base})
    (target / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_adapter(folder: Path, lora: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Compare an adapter with those that a run is to train, by its headers.

    Args:
        folder: In PEFT's format.
        lora: Of the run.
        shapes: The trained tensors of the run's model.

    Raises:
        CheckpointError: It is another kind of adapter, or one of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, "pt") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no whole adapter: {error}") from error
    if facts.get("peft_type") != "LORA" or any(facts.get(name) for name in VARIANTS):
        raise CheckpointError(
            f"{CONFIG} names another kind of adapter than plain LoRA, which is what is trained"
        )
    own = {"rank": lora.rank, "alpha": lora.alpha}
    its = {"rank": facts.get("r"), "alpha": facts.get("lora_alpha")}
    if own != its:
        raise CheckpointError(
            f"an adapter of model.lora.rank={its['rank']} and model.lora.alpha={its['alpha']}; "
            f"this run has model.lora.rank={own['rank']} and model.lora.alpha={own['alpha']}"
        )
    wanted = {peft_name(name): shape for name, shape in shapes.items()}
    different = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if different:
        name = different[0]
        raise CheckpointError(
            f"an adapter of another model, or of other model.lora.targets: {name} is "
            f"{found.get(name)} there and {wanted.get(name)} here"
        )


def load_adapter(model: torch.nn.Module, folder: Path, dtype: str, base: str) -> None:
    """Take an adapter's numbers.

    Args:
        model: Whole, with adapters that `check_adapter` has compared with this one.
        folder: In PEFT's format.
        dtype: Of the model.
        base: Digest of the frozen model in this precision.

    Raises:
        CheckpointError: It was trained beside other weights.
    """
    from safetensors import safe_open

    with safe_open(folder / TENSORS, "pt") as file, torch.no_grad():
        its, _, precision = (file.metadata() or {}).get(BASE, "").partition(" ")
        if precision == dtype and its != base:
            raise CheckpointError(
                f"model.init_from={folder}: the adapter was trained beside other weights than "
                "those of model.path: set model.path to the model that it belongs to"
            )
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(file.get_tensor(peft_name(f"{name}.lora_A")))
            layer.lora_B.copy_(file.get_tensor(peft_name(f"{name}.lora_B")))
