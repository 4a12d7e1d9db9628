"""DeepSpeed's configuration, the optimizer that it wraps, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import overload

import torch

from cohort.actors.plain import JsonObject
from cohort.learner.config import Dtype, LearnerConfig


def lr_at(update: int, learner: LearnerConfig, total_updates: int) -> float:
    """Learning rate of optimizer update `update`, counted from 1.

    Linear warm-up: the first update is above 0, update `warmup_steps` is at the peak. From there
    constant, or along a line or half a cosine to `lr_final` of the peak at `total_updates`.

    Args:
        update: Counted from 1.
        learner: Peak, warm-up and schedule.
        total_updates: Of the whole run.
    """
    peak, warmup = learner.learning_rate, max(1, learner.warmup_steps)
    if update <= warmup:
        return peak * update / warmup
    if learner.lr_schedule == "constant":
        return peak
    done = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    falling = 1.0 - done if learner.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (learner.lr_final + (1.0 - learner.lr_final) * falling)


# DeepSpeed's names of the precisions that have a float32 copy of the weights beside them.
SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16"}
# Gradients that ranks reduce at a time. ZeRO-3 holds a float32 buffer of this many, always;
# DeepSpeed's 500 million are 2 GB a rank.
REDUCE_BUCKET = 50_000_000
# Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740): halved when a gradient is not
# finite, doubled after a window of updates without.
LOSS_SCALING = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 200,
    "hysteresis": 1,
    "min_loss_scale": 1,
}


def deepspeed_config(learner: LearnerConfig, dtype: Dtype, device: str = "cpu") -> JsonObject:
    """The DeepSpeed configuration of a run.

    On GPUs gradients are reduced while the backward pass goes on, from stage 2 on: below, DeepSpeed
    refuses it without a number of micro-batches that all steps have. CPUs have no streams for it.

    Master weights are float32 in every combination: the model itself in float32, a copy that
    DeepSpeed keeps in bfloat16 and float16.
    """
    stage = learner.zero_stage
    config: JsonObject = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Steps have any number of micro-batches: `step()` is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": learner.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device == "cuda" and stage >= 2,
            "reduce_bucket_size": REDUCE_BUCKET,
        },
    }
    if learner.offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if learner.offload == "all":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    for key, value in learner.deepspeed.items():
        if isinstance(value, dict):
            config[key] = {**config.get(key, {}), **value}
        else:
            config[key] = value
    if dtype != "float32":
        config[SHORT_NAMES[dtype]] = {"enabled": True}
        # Sums in 16 bits, over micro-batches and over ranks, would lose small gradients.
        config["communication_data_type"] = "fp32"
        if stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if dtype == "float16":
            config["fp16"] |= LOSS_SCALING
    elif stage == 0:
        config["gradient_clipping"] = 0.0  # ClippingAdamW does it
    return config


def client_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    learner: LearnerConfig,
    dtype: Dtype,
) -> torch.optim.AdamW:
    """The AdamW that DeepSpeed wraps, or uses as it is in float32 without ZeRO."""
    kind = ClippingAdamW if dtype == "float32" and learner.zero_stage == 0 else torch.optim.AdamW
    optimizer = kind(
        parameters,
        lr=learner.learning_rate,
        betas=learner.adam_betas,
        eps=learner.adam_eps,
        weight_decay=learner.weight_decay,
        fused=True,
    )
    if isinstance(optimizer, ClippingAdamW):
        optimizer.max_norm = learner.gradient_clip
    return optimizer


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and leaves out a step whose norm is not finite.

    In float32 without ZeRO, DeepSpeed does not check the gradients at all. All ranks hold the
    same, reduced gradients here, so they decide alike. DeepSpeed's engine reads `overflow` and
    `_global_grad_norm` after each step, as it does from its own optimizers.
    """

    max_norm: float = math.inf
    overflow: bool = False
    _global_grad_norm: float = 0.0

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        return None if self.overflow else super().step(closure)
