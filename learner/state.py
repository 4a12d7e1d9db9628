"""What a learner rank holds between calls: policy, DeepSpeed engine, reference, counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from cohort.learner.logprobs import ModelInputs, PolicyModel
from cohort.learner.spec import LearnerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cohort.learner.reference import Reference


class LossScaler(Protocol):
    """DeepSpeed's loss scaler."""

    loss_scale: float


class EngineOptimizer(Protocol):
    """The optimizer of DeepSpeed's engine.

    Attributes:
        loss_scaler: Only in float16.
    """

    param_groups: list[dict[str, object]]
    loss_scaler: LossScaler
    # Of ZeRO: the optimizer of its flat tensors, and these under ZeRO-3.
    optimizer: torch.optim.Optimizer
    fp32_partitioned_groups_flat: list[torch.Tensor]


class CheckpointWriter(Protocol):
    """DeepSpeed's writer of checkpoint files."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: object, path: str) -> None: ...


class Engine(Protocol):
    """The parts of `deepspeed.DeepSpeedEngine` that a rank uses, around a `PolicyModel`."""

    optimizer: EngineOptimizer
    checkpoint_engine: CheckpointWriter
    enable_backward_allreduce: bool
    save_non_zero_checkpoint: bool

    def __call__(
        self, inputs: ModelInputs, temperature: float, chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> object: ...

    def step(self) -> None: ...

    def was_step_applied(self) -> bool: ...

    def get_global_grad_norm(self) -> float: ...

    def save_checkpoint(
        self,
        save_dir: str,
        *,
        tag: str,
        client_state: dict[str, int],
        save_latest: bool,
        exclude_frozen_parameters: bool,
    ) -> object: ...

    def load_checkpoint(
        self,
        load_dir: str,
        *,
        tag: str,
        load_lr_scheduler_states: bool,
        custom_load_fn: Callable[[Mapping[str, torch.Tensor], torch.nn.Module], None] | None,
    ) -> tuple[str | None, dict[str, int]]: ...


@dataclass
class RankState:
    """One rank after set-up.

    Attributes:
        spec: What it was built from.
        device: Of the model and of all batches.
        model_folder: The Hugging Face folder that the model was loaded from.
        policy: The model; under ZeRO-3 each rank holds a part of it.
        engine: DeepSpeed around the policy.
        reference: The frozen policy of the KL term; None without one.
        base: xxh3-128 over the frozen weights where adapters are trained; None without them.
        steps_done: Steps with an update that was applied.
        updates_done: Optimizer updates that were applied.
    """

    spec: LearnerSpec
    device: torch.device
    model_folder: Path
    policy: PolicyModel
    engine: Engine
    reference: Reference | None = None
    base: str | None = None
    steps_done: int = 0
    updates_done: int = 0

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model inside the policy."""
        return self.policy.model


def everywhere(holds: bool, device: torch.device) -> bool:
    """Whether something holds on every rank; all of them ask together.

    Args:
        holds: Whether it holds on this rank.
        device: Of this rank's model, over which the ranks communicate.
    """
    answer = torch.tensor(float(holds), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)
