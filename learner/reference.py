"""The reference policy of the KL term: frozen, and the ORIGINAL model until it is refreshed.

Where adapters are trained, it is the policy's own model without them: no second one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch

from cohort.learner.config import Dtype
from cohort.learner.logprobs import ModelInputs, PolicyModel
from cohort.learner.lora import lora_layers, reference_policy
from cohort.learner.optimizer import SHORT_NAMES
from cohort.learner.weights import (
    digest_of,
    gather_adapters,
    gather_named_weights,
    named_tensors,
    shared_buckets,
    whole,
)

REFERENCE_FILE = "reference.safetensors"
Forward = Callable[[ModelInputs, float, int], tuple[torch.Tensor, torch.Tensor]]


class Reference(Protocol):
    """A frozen policy; all ranks enter every method together.

    Attributes:
        refreshed: Whether it has ever become the policy.
        fingerprint: xxh3-128 over the tensors of the original model.
    """

    refreshed: bool
    fingerprint: str

    def logprobs(self, inputs: ModelInputs, temperature: float, chunks: int) -> torch.Tensor: ...

    def become(self, model: torch.nn.Module) -> None: ...

    def save(self, folder: Path, write: bool) -> None: ...

    def load(self, folder: Path) -> None: ...


class ReferencePolicy:
    """Log-probs of a policy that never trains.

    Every rank holds it whole, in the precision of the policy; under ZeRO-3 it is partitioned like
    the policy itself. All ranks enter every method together.

    Args:
        policy: The original model, whole.
        zero_stage: Of the learner.
        dtype: Of the policy.

    Attributes:
        refreshed: Whether it has ever become the policy.
        fingerprint: xxh3-128 over the tensors of the original model.
    """

    def __init__(self, policy: PolicyModel, zero_stage: int, dtype: Dtype) -> None:
        self._policy = policy.requires_grad_(False)
        self._stage = zero_stage
        self.refreshed = False
        self.fingerprint = digest_of(policy.model)
        self._forward: Forward = policy
        if zero_stage == 3:
            import deepspeed

            config: dict[str, object] = {
                "train_micro_batch_size_per_gpu": 1,
                "steps_per_print": None,
                "zero_optimization": {"stage": 3},
            }
            if dtype != "float32":
                config[SHORT_NAMES[dtype]] = {"enabled": True}
            self._forward, *_ = deepspeed.initialize(
                model=policy, config=config, dist_init_required=False
            )

    @torch.no_grad()
    def logprobs(self, inputs: ModelInputs, temperature: float, chunks: int) -> torch.Tensor:
        """[T] float32, nats, of the same tokens at the same temperature as the policy's."""
        logprobs_T, _ = self._forward(inputs, temperature, chunks)
        return logprobs_T

    def become(self, model: torch.nn.Module) -> None:
        """Take the weights of the policy's model as they are now."""
        source = named_tensors(model)
        with torch.no_grad():
            for names, target in self._open_buckets():
                with ExitStack() as opened:
                    if self._stage == 3:
                        opened.enter_context(whole([source[name] for name in names]))
                    for name in names:
                        target[name].copy_(source[name])
        self.refreshed = True

    def save(self, folder: Path, write: bool) -> None:
        """Write the weights into `folder`; `write` is True on one rank, the others take part."""
        from safetensors.torch import save_file

        state = {}
        for name, tensor in gather_named_weights(self._policy.model, self._stage):
            if write:
                state[name] = tensor.to("cpu", copy=True).contiguous()
        if write:
            save_file(state, folder / REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Take the weights that `save` wrote, if it wrote any: a reference that was refreshed."""
        from safetensors import safe_open

        if not (folder / REFERENCE_FILE).is_file():
            return
        with safe_open(folder / REFERENCE_FILE, "pt") as file, torch.no_grad():
            for names, target in self._open_buckets():
                for name in names:
                    target[name].copy_(file.get_tensor(name))
        self.refreshed = True

    def _open_buckets(self) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
        """A bucket at a time, whole and writable on every rank."""
        for bucket in shared_buckets(named_tensors(self._policy.model), self._stage):
            with ExitStack() as opened:
                if self._stage == 3:
                    # Every rank writes the same values, but only rank 0's are kept.
                    opened.enter_context(whole([t for _, t in bucket], modifier_rank=0))
                yield [name for name, _ in bucket], dict(bucket)


class AdapterReference:
    """The policy without its adapters, or with those that it had when it was refreshed last, which
    every rank holds whole.

    Args:
        model: The policy's model.
        forward: DeepSpeed's engine around the policy.
        zero_stage: Of the learner.
        fingerprint: xxh3-128 over the frozen model.

    Attributes:
        refreshed: Whether it has ever become the policy.
        fingerprint: As given.
    """

    def __init__(
        self, model: torch.nn.Module, forward: Forward, zero_stage: int, fingerprint: str
    ) -> None:
        self.refreshed = False
        self.fingerprint = fingerprint
        self._model = model
        self._forward = forward
        self._stage = zero_stage

    @torch.no_grad()
    def logprobs(self, inputs: ModelInputs, temperature: float, chunks: int) -> torch.Tensor:
        """[T] float32, nats, of the same tokens at the same temperature as the policy's."""
        with reference_policy(self._model):
            logprobs_T, _ = self._forward(inputs, temperature, chunks)
        return logprobs_T

    def become(self, model: torch.nn.Module) -> None:
        """Take the adapters of the policy's model as they are now."""
        layers = lora_layers(self._model)
        for name, a, b in gather_adapters(model, self._stage):
            layers[name].reference = (a.clone(), b.clone())
        self.refreshed = True

    def save(self, folder: Path, write: bool) -> None:
        """Write the adapters into `folder`, where `write`; others need not take part."""
        from safetensors.torch import save_file

        state: dict[str, torch.Tensor] = {}
        for name, layer in lora_layers(self._model).items():
            if write and layer.reference is not None:
                a, b = layer.reference
                state |= {f"{name}.lora_A": a.cpu(), f"{name}.lora_B": b.cpu()}
        if write:
            save_file(state, folder / REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Take the adapters that `save` wrote, if it wrote any: a reference that was refreshed."""
        from safetensors import safe_open

        if not (folder / REFERENCE_FILE).is_file():
            return
        with safe_open(folder / REFERENCE_FILE, "pt") as file:
            for name, layer in lora_layers(self._model).items():
                a, b = (file.get_tensor(f"{name}.{part}") for part in ("lora_A", "lora_B"))
                layer.reference = (a.to(layer.lora_A), b.to(layer.lora_B))
        self.refreshed = True
