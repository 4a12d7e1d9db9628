"""Every preset as it is, against the reference that computes one token at a time."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from cohort.actors.records import ScoredGroup
from cohort.learner.batch import BatchTensors, build_micro_batch
from cohort.learner.config import AlgorithmConfig
from cohort.learner.grpo import policy_loss
from cohort.learner.logprobs import PolicyModel
from cohort.learner.packing import Packer
from cohort.learner.plan import plan_step
from cohort.learner.presets import Preset
from tests.learner.helpers import metas, reference_loss, scored_group, tiny_model

TEMPERATURE = 0.8


def groups() -> list[ScoredGroup]:
    return [
        scored_group("a", [1.0, 0.0, 0.35, None], [3, 11, 30, 5], prompt_tokens=9, truncated=(1,)),
        scored_group("b", [0.5, 0.5, 0.5], [4, 4, 29]),
        scored_group("c", [0.0, 1.0, 1.0, 0.0], [1, 2, 32, 4], prompt_tokens=2, truncated=(2,)),
        scored_group("d", [None, 1.0], [3, 3]),
    ]


def moved(seed: int, by: float) -> Any:
    """The policy at another time: every weight a little different."""
    model = tiny_model("llama-tied")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def score(policy: PolicyModel, tensors: BatchTensors) -> torch.Tensor:
    logprobs_T, _ = policy(tensors, TEMPERATURE)
    return logprobs_T


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_later_update_of_every_preset(preset: Preset) -> None:
    """Loss and every gradient, where ratios have left 1 and the reference is another policy."""
    algorithm = AlgorithmConfig(preset=preset)
    policy, old, reference = tiny_model("llama-tied"), moved(1, 0.02), moved(2, 0.05)
    expected = reference_loss(
        policy, groups(), temperature=TEMPERATURE, algorithm=algorithm, old=old,
        reference=reference,
    )  # fmt: skip
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    models = {"now": PolicyModel(policy), "old": PolicyModel(old), "ref": PolicyModel(reference)}
    by_id = {group.group.id: group for group in groups()}
    # Cut into many micro-batches, and into few.
    for budget in (16, 8192):
        policy.zero_grad()
        plan = plan_step(
            [metas(group) for group in by_id.values()], algorithm, Packer(2, budget), max_tokens=32
        )
        total = clipped = 0.0
        for batch in (batch for shard in plan.updates[0] for batch in shard):
            tensors = build_micro_batch(batch, by_id)
            with torch.no_grad():
                before, base = score(models["old"], tensors), score(models["ref"], tensors)
            inputs = tensors.loss_inputs(
                score(models["now"], tensors),
                old_T=before,
                reference_T=base if algorithm.kl_coef else None,
            )
            loss, stats = policy_loss(inputs, algorithm)
            loss.backward()
            total += loss.item()
            clipped += stats.clipped
        assert total == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5 * norm, rtol=2e-3)
        assert clipped > 0 or preset in ("r1", "cispo")  # their bounds are far away
