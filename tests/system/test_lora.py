"""Adapters on real ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cohort.learner.config import AlgorithmConfig
from cohort.learner.learner import Learner, LearnerError
from cohort.learner.lora_config import LoraConfig
from tests.learner.helpers import reference_loss
from tests.system.test_learner import (
    GRADIENT_PROBE,
    TEMPERATURE,
    batch,
    bits,
    cluster,
    models,
    published,
    put,
    run,
    spec_for,
    start,
    weights,
)

__all__ = ["cluster", "models", "run"]
pytestmark = [pytest.mark.system, pytest.mark.exhaustive]

LORA = LoraConfig(rank=3, alpha=7.5)
# With a KL to the reference, which is the model without adapters.
ALGORITHM = AlgorithmConfig(preset="grpo_paper", kl_coef=0.2)
PREFIX = "base_model.model."
SHAPES = [
    (2, 3, "float32", "llama-tied"),
    (1, 0, "float32", "gpt2"),
    (2, 0, "bfloat16", "llama-tied"),
    (1, 1, "float32", "qwen2-untied"),
    (2, 1, "bfloat16", "llama-tied"),
    (2, 2, "float32", "gpt2"),
    (1, 3, "bfloat16", "gpt2"),
]


class Plain:
    """The model with merged weights that autograd knows as functions of A and B."""

    def __init__(self, model: Path, adapter: dict[str, torch.Tensor]) -> None:
        dtype = next(iter(adapter.values())).dtype
        # Frozen weights have the model's precision; the sum has float32's.
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).float().eval()
        self.leaves = {name: t.float().clone().requires_grad_() for name, t in adapter.items()}
        self.weights = {}
        for name, layer in self.model.named_modules():
            if f"{PREFIX}{name}.lora_A.weight" in adapter:
                a, b = (self.leaves[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
                delta = LORA.alpha / LORA.rank * (b @ a)
                delta = delta.T if isinstance(layer, Conv1D) else delta
                self.weights[f"{name}.weight"] = layer.weight.detach() + delta

    def __call__(self, **given: Any) -> Any:
        return torch.func.functional_call(self.model, self.weights, (), given)


async def saved(group: Learner, folder: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint; its adapter."""
    folder.mkdir()
    await group.save(folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


async def next_weights(group: Learner) -> dict[str, torch.Tensor]:
    assert (await group.step([put(g) for g in batch()])).applied
    return await weights(group)


@pytest.mark.parametrize(("ranks", "stage", "dtype", "kind"), SHAPES)
def test_a_step_equals_the_reference_and_goes_on_after_deaths_and_resumes(
    run: Any, models: dict[str, Path], tmp_path: Path, ranks: int, stage: int, dtype: str, kind: str
) -> None:
    """Gradients of A and B, what is published and saved; then the same step three times: after a
    checkpoint, after a rank's death, and by a learner that comes after."""
    shm = Path("/dev/shm") / f"cohort-learner-{os.getpid()}-lora"
    exact = dtype == "float32"
    options = GRADIENT_PROBE if exact else dict(learning_rate=1e-2)
    spec = spec_for(models[kind], ranks, shm, zero_stage=stage, dtype=dtype, **options)
    spec = replace(spec, algorithm=ALGORITHM, lora=LORA, log_dir=str(tmp_path / "logs"))

    async def check() -> None:
        group = await start(spec)
        try:
            model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=dtype)
            assert bits(await weights(group)) == bits(published(model))
            first = await group.step([put(g) for g in batch()])
            assert first.applied
            # B began as zeros: the policy was the reference, and only B has moved.
            assert first.reference_kl == pytest.approx(0.0, abs=1e-6)
            before = await saved(group, tmp_path / "1")
            result = await group.step([put(g) for g in batch()])
            assert result.applied
            after = await saved(group, tmp_path / "2")
            assert all(not torch.equal(after[name], before[name]) for name in before)
            if exact:
                compare_step(result, before, after)
            merged = await weights(group)
            plain = Plain(models[kind], after)
            for name, weight in plain.weights.items():
                torch.testing.assert_close(merged[name], weight.detach().to(merged[name].dtype))
            assert [name for name in merged if name not in plain.weights]
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "hf", dtype="auto")
            assert bits(published(again)) == bits(merged)
            only_adapters(tmp_path / "2" / "deepspeed")

            straight = bits(await next_weights(group))
            assert straight != bits(merged)
            await group.load(tmp_path / "2")
            assert bits(await next_weights(group)) == straight
            # From a checkpoint; then from a copy, which is of the step before.
            await group.load(tmp_path / "2")
            assert group._gang is not None
            os.kill(group._gang._places[-1].pid, signal.SIGKILL)
            assert bits(await next_weights(group)) == straight
            fourth = await group.step([put(g) for g in batch()])
            os.kill(group._gang._places[-1].pid, signal.SIGKILL)
            fifth = bits(await next_weights(group))
            assert (group.restarts, group.version) == (2, 5)
            assert fourth.applied
        finally:
            group.kill()
        later = await start(replace(spec, shm_dir=str(tmp_path / "later")))
        try:
            assert await later.load(tmp_path / "2") == 2
            assert bits(await weights(later)) == bits(merged)
            for expected in (straight, None, fifth):
                found = bits(await next_weights(later))
                assert expected in (None, found)
        finally:
            later.kill()

    def compare_step(result: Any, before: Any, after: Any) -> None:
        plain = Plain(models[kind], before)
        original = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
        loss = reference_loss(
            plain, batch(), temperature=TEMPERATURE, algorithm=ALGORITHM, reference=original
        )
        loss.backward()
        norm = sum(float((leaf.grad**2).sum()) for leaf in plain.leaves.values()) ** 0.5
        assert result.loss == pytest.approx(loss.item(), rel=2e-5, abs=2e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        assert result.reference_kl > 1e-6
        assert before.keys() == plain.leaves.keys()
        for name, leaf in plain.leaves.items():
            moved = before[name] - after[name]
            torch.testing.assert_close(moved, leaf.grad, atol=2e-5 * norm, rtol=2e-3)

    run(check())


def only_adapters(folder: Path) -> None:
    """DeepSpeed has saved nothing of the frozen weights."""
    files = list(folder.rglob("*model_states.pt"))
    assert files
    for file in files:
        state = torch.load(file, weights_only=False)
        assert all(".lora_" in name for name in state["module"]), list(state["module"])
        assert not state["frozen_param_fragments"]


def test_other_shapes_and_new_runs_start_from_an_adapter(
    run: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """Another number of ranks and ZeRO stage; as model.init_from, where another base is refused."""

    async def check() -> None:
        spec = spec_for(models["llama-tied"], 2, tmp_path / "a", zero_stage=3, learning_rate=1e-2)
        # The reference is refreshed after each step.
        algorithm = AlgorithmConfig(kl_coef=0.1, reference_refresh_steps=1)
        spec = replace(spec, lora=LORA, algorithm=algorithm)
        group = await start(spec)
        try:
            await next_weights(group)
            expected = bits(await next_weights(group))
            await saved(group, tmp_path / "2")
            # The policy is its own reference.
            third = await group.step([put(g) for g in batch()])
            assert third.reference_kl == pytest.approx(0.0, abs=1e-9)
        finally:
            group.kill()
        other = spec_for(models["llama-tied"], 1, tmp_path / "b", zero_stage=1, learning_rate=1e-2)
        other = replace(other, lora=LORA, algorithm=algorithm)
        group = await start(other)
        try:
            assert await group.load(tmp_path / "2") == 2
            assert bits(await weights(group)) == expected
            again = await group.step([put(g) for g in batch()])
            assert again.loss == pytest.approx(third.loss, rel=1e-3, abs=1e-5)
            assert again.reference_kl == pytest.approx(0.0, abs=1e-9)
        finally:
            group.kill()
        fresh = replace(
            other, shm_dir=str(tmp_path / "c"), init_from=str(tmp_path / "2" / "adapter")
        )
        group = await start(fresh)
        try:
            assert group.version == 0
            assert bits(await weights(group)) == expected
            # The reference is that of model.path.
            first = await group.step([put(g) for g in batch()])
            assert first.reference_kl > 1e-6
        finally:
            group.kill()
        with pytest.raises(LearnerError, match=r"model\.init_from=.*set model\.path"):
            await start(
                replace(fresh, model_path=str(models["llama-other"]), shm_dir=str(tmp_path / "d"))
            )
        await asyncio.sleep(0)

    run(check())
