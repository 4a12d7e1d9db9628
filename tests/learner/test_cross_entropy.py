"""Cross-entropy on demonstrations, against torch's own on whole sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cohort.actors.records import ScoredGroup
from cohort.learner.advantages import group_advantages
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import CROSS_ENTROPY_NEEDS, AlgorithmConfig
from cohort.learner.grpo import LossInputs, LossStats, policy_loss
from cohort.learner.logprobs import PolicyModel
from cohort.learner.packing import Packer
from cohort.learner.plan import StepPlan, plan_step
from cohort.learner.self_check import self_check
from tests.learner.helpers import metas, scored_group, tiny_model

ALGORITHM = AlgorithmConfig(objective="cross_entropy")


def shown(group_id: str, length: int, prompt_tokens: int) -> ScoredGroup:
    """A demonstration: one completion, without behaviour log-probs."""
    scored = scored_group(group_id, [1.0], [length], prompt_tokens)
    [completion] = scored.group.completions
    blind = replace(completion, logprobs=np.full(length, math.nan, dtype=np.float32))
    return replace(scored, group=replace(scored.group, completions=(blind,)))


def planned(groups: list[ScoredGroup], budget: int = 8192, ranks: int = 1) -> StepPlan:
    return plan_step(
        [metas(group) for group in groups],
        ALGORITHM,
        Packer(ranks, budget, logit_chunk_tokens=5),
        max_tokens=32,
    )


def torch_cross_entropy(model: Any, groups: list[ScoredGroup]) -> torch.Tensor:
    """The mean over all completion tokens; prompts carry the label that torch leaves out."""
    logits, labels = [], []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        sequence = torch.tensor([*prompt, *scored.group.completions[0].token_ids.tolist()])
        label = sequence.clone()
        label[: len(prompt)] = -100
        logits.append(model(input_ids=sequence[None], use_cache=False).logits[0, :-1])
        labels.append(label[1:])
    return functional.cross_entropy(torch.cat(logits).float(), torch.cat(labels))


@pytest.mark.parametrize(("kind", "budget"), [("llama-tied", 8192), ("gpt2", 32)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradients_are_those_of_torch(kind: str, budget: int, ranks: int) -> None:
    """In one forward pass or several, on one rank or two; lengths that tell means apart."""
    groups = [shown("a", 3, 9), shown("b", 17, 2), shown("c", 1, 5), shown("d", 6, 30)]
    model = tiny_model(kind)
    expected = torch_cross_entropy(model, groups)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    policy, stats = PolicyModel(model), LossStats()
    self_check(policy, 1.0)
    plan = planned(groups, budget, ranks)
    assert (plan.trained, plan.filtered, plan.failed) == (4, 0, 0)
    if budget == 32:
        assert plan.micro_batches > 1
    by_id = {scored.group.id: scored for scored in groups}
    for batch in (batch for shard in plan.updates[0] for batch in shard if batch.rows):
        tensors = build_micro_batch(batch, by_id)
        loss, found = policy_loss(
            tensors.loss_inputs(*policy(tensors, 1.0, batch.chunks)), ALGORITHM
        )
        loss.backward()
        stats += found
    assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
    # The engine's log-probs are nan: nothing that is logged may show it.
    assert all(math.isfinite(value) for value in vars(stats).values())
    assert (stats.tokens, stats.engine_ratio) == (27, 27)
    assert (stats.k3, stats.log_ratio_abs_max, stats.clipped, stats.corrected) == (0, 0, 0, 0)


def test_a_demonstration_counts_one_and_may_be_alone() -> None:
    assert group_advantages([0.3, None, 0.3, math.nan], ALGORITHM) == [1.0, None, 1.0, None]
    assert group_advantages([5.0], ALGORITHM) == [1.0]
    assert group_advantages([5.0], AlgorithmConfig()) == [None]
    [[[batch]]] = planned([shown("a", 3, 4), shown("b", 9, 4)]).updates
    assert sorted(segment.tokens for segment in batch.segments) == [3, 9]
    assert all(segment.weight == pytest.approx(1 / 12) for segment in batch.segments)


def test_a_padding_token_gives_nothing() -> None:
    """A rank without rows takes part with a token of weight 0, whatever its log-prob."""
    logprobs = torch.tensor([-0.5, -math.inf], requires_grad=True)
    weights, nothing = torch.tensor([1.0, 0.0]), torch.zeros(2)
    inputs = LossInputs(logprobs, nothing, nothing, weights, torch.zeros(2).long())
    loss, stats = policy_loss(inputs, ALGORITHM)
    loss.backward()
    assert (stats.loss, stats.tokens) == (0.5, 1)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("aggregation", "sequence"), ("kl_coef", 0.1), ("entropy_coef", 0.1),
        ("overlong_buffer", 0.1), ("mask_truncated", True), ("dynamic_sampling_rounds", 1),
        ("updates_per_step", 2), ("sequence_mask", (0.9, 1.1)), ("negative_mask", 0.5),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused(key: str, value: Any) -> None:
    assert ALGORITHM.contradictions() == []
    assert key in CROSS_ENTROPY_NEEDS
    [problem] = AlgorithmConfig(objective="cross_entropy", **{key: value}).contradictions()
    assert f"algorithm.{key}=" in problem
    assert "cross_entropy" in problem
