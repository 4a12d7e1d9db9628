"""Shared-prompt rows score and train exactly like single sequences through the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cohort.actors.records import ScoredGroup
from cohort.learner.batch import BatchTensors, build_micro_batch
from cohort.learner.config import AlgorithmConfig
from cohort.learner.grpo import policy_loss
from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from cohort.learner.output_layer import LogitScale
from cohort.learner.packing import MicroBatch, Packer, RowCost
from cohort.learner.plan import plan_step
from cohort.learner.self_check import self_check
from tests.learner.helpers import (
    metas,
    reference_logprobs,
    reference_loss,
    scored_group,
    tiny_model,
)

KINDS = [
    "llama-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "gpt2", "gemma", "gemma2",
    "gemma3", "granite", "mistral-sliding",
]  # fmt: skip
TEMPERATURE = 0.7


def groups() -> list[ScoredGroup]:
    return [
        scored_group("a", [1.0, 0.0, 0.5], [3, 9, 1], prompt_tokens=6, truncated=(1,)),
        scored_group("b", [0.0, 1.0], [12, 5], prompt_tokens=2),
    ]


def one_batch(scored: list[ScoredGroup]) -> tuple[list[str], BatchTensors]:
    """All groups in one micro-batch, each prompt once; and the ids in tensor order."""
    plan = plan_step(
        [metas(g) for g in scored],
        AlgorithmConfig(),
        Packer(ranks=1, micro_batch_tokens=10_000, cost=RowCost(quadratic=0.0)),
        max_tokens=32,
    )
    ((batch,),) = plan.updates[0]
    assert len(batch.rows) == len(scored)
    ids = [segment.completion_id for row in batch.rows for segment in row.segments]
    return ids, build_micro_batch(batch, {g.group.id: g for g in scored})


def score(policy: PolicyModel, tensors: BatchTensors, chunks: int) -> Any:
    return policy(tensors, TEMPERATURE, chunks)


LENGTH = 32


def padded_hidden(policy: PolicyModel, tensors: BatchTensors, attention: str) -> torch.Tensor:
    """The hidden states that predict, from the model's own forward over rows padded to LENGTH."""
    ids, positions = torch.zeros(2, len(tensors.tree.rows), LENGTH, dtype=torch.long)
    places = tensors.tree.places(LENGTH, torch.device("cpu"))
    ids.view(-1)[places] = tensors.input_ids_N
    positions.view(-1)[places] = tensors.position_ids_N
    masks = policy._masks(tensors.tree.mask(LENGTH, torch.device("cpu")), positions, attention)
    policy.model.set_attn_implementation(attention)
    output = policy.model.base_model(input_ids=ids, position_ids=positions, attention_mask=masks)
    return output.last_hidden_state.flatten(0, 1)[places[tensors.predict_T]]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("attention", "masked"), [("tree", 0), ("tree", 14), ("tree", 256), ("eager", 0), ("sdpa", 0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_single_sequences(
    kind: str, attention: Any, masked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cohort.learner.attention.MASKED_ROW_LENGTH", masked)
    model = tiny_model(kind)
    if kind == "gemma2" and attention != "eager":
        with pytest.raises(UnsupportedModel, match="attention scores"):
            PolicyModel(model, attention)
        return
    scored = groups()
    ids, tensors = one_batch(scored)
    logprobs, entropy = score(PolicyModel(model, attention), tensors, 1)
    completions = {c.id: (g, c) for g in scored for c in g.group.completions}
    model.set_attn_implementation("eager")
    expected = torch.cat(
        [
            reference_logprobs(
                model,
                completions[i][0].group.prompt.token_ids,
                completions[i][1].token_ids,
                TEMPERATURE,
            )
            for i in ids
        ]
    )
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert bool((entropy > 0).all())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("chunks", [1, 4, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_reference(
    kind: str, chunks: int, gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter's gradient, whatever the number of parts of the output layer."""
    monkeypatch.setattr("cohort.learner.attention.MASKED_ROW_LENGTH", 0 if chunks == 1 else 256)
    model = tiny_model(kind)
    scored = groups()
    model.set_attn_implementation("eager")
    expected_loss = reference_loss(model, scored, temperature=TEMPERATURE)
    expected_loss.backward()
    expected = gradients(model)
    _, tensors = one_batch(scored)
    attention: Any = "eager" if chunks == 4 or kind == "gemma2" else "tree"
    policy = PolicyModel(model, attention, gradient_checkpointing)
    logprobs, entropy = score(policy, tensors, chunks)
    loss, _ = policy_loss(tensors.loss_inputs(logprobs, entropy), AlgorithmConfig())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected_loss.item(), abs=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    model = tiny_model("llama-tied")
    _, tensors = one_batch(groups())
    policy = PolicyModel(model)
    _, entropy = score(policy, tensors, 2)
    hidden = padded_hidden(policy, tensors, "sdpa")
    logits = model.lm_head(hidden) / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_under_gradient_checkpointing() -> None:
    _, tensors = one_batch(groups())
    policy = PolicyModel(tiny_model("gpt2"), gradient_checkpointing=True)
    first, _ = score(policy, tensors, 1)
    second, _ = score(policy, tensors, 1)
    assert torch.equal(first, second)


def test_other_completions_do_not_matter() -> None:
    """The same completion beside others whose tokens change."""
    policy = PolicyModel(tiny_model("llama-tied"))
    alone = scored_group("a", [1.0, 0.0, 0.5], [3, 9, 1], prompt_tokens=6)
    ids, tensors = one_batch([alone])
    start = sum(3 if i == "a/0" else 9 if i == "a/1" else 1 for i in ids[: ids.index("a/0")])
    base, _ = score(policy, tensors, 1)
    changed = tensors.input_ids_N.clone()
    position = 6 + sum({"a/0": 3, "a/1": 9, "a/2": 1}[i] for i in ids[: ids.index("a/1")])
    changed[position : position + 9] = 5
    other, _ = score(policy, BatchTensors(**{**vars(tensors), "input_ids_N": changed}), 1)
    torch.testing.assert_close(other[start : start + 3], base[start : start + 3])
    assert not torch.equal(other, base)


@pytest.mark.parametrize("kind", KINDS)
def test_self_check_accepts_supported_models(kind: str) -> None:
    policy = PolicyModel(tiny_model(kind))
    self_check(policy, TEMPERATURE)
    assert policy.shares_prompts
    assert policy.can_tree == (kind != "gemma2")


def test_a_model_that_masks_by_itself_gets_a_row_for_each_completion() -> None:
    """A state-space model reads every token before it, whatever a mask says."""
    model = tiny_model("mamba")
    policy = PolicyModel(model)
    self_check(policy, TEMPERATURE)
    assert not policy.shares_prompts
    scored = groups()
    plan = plan_step(
        [metas(g) for g in scored],
        AlgorithmConfig(),
        Packer(ranks=1, micro_batch_tokens=10_000, share_prompts=policy.shares_prompts),
        max_tokens=32,
    )
    ((batch,),) = plan.updates[0]
    assert [len(row.segments) for row in batch.rows] == [1] * 5
    tensors = build_micro_batch(batch, {g.group.id: g for g in scored})
    logprobs, _ = score(policy, tensors, 2)
    completions = {c.id: (g, c) for g in scored for c in g.group.completions}
    expected = [
        reference_logprobs(
            model,
            completions[row.segments[0].completion_id][0].group.prompt.token_ids,
            completions[row.segments[0].completion_id][1].token_ids,
            TEMPERATURE,
        )
        for row in batch.rows
    ]
    torch.testing.assert_close(logprobs, torch.cat(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedModel, match=r"learner\.attention=tree"):
        self_check(PolicyModel(tiny_model("mamba"), "tree"), TEMPERATURE)


def test_self_check_refuses_logits_it_does_not_understand() -> None:
    policy = PolicyModel(tiny_model("gemma2"))
    policy.scale = LogitScale()
    with pytest.raises(UnsupportedModel, match="Gemma2ForCausalLM"):
        self_check(policy, TEMPERATURE)


def test_empty_micro_batch_has_zero_gradient_everywhere() -> None:
    model = tiny_model("llama-tied")
    tensors = build_micro_batch(MicroBatch((), 1), {})
    logprobs, _ = score(PolicyModel(model), tensors, 3)
    loss, stats = policy_loss(tensors.loss_inputs(logprobs), AlgorithmConfig())
    loss.backward()
    assert stats.tokens == 0
    # Present, because ZeRO waits for the gradient of every parameter, and zero.
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert float(gradient.abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["llama-tied", "gemma2"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_entropy_has_its_gradient(kind: str, chunks: int) -> None:
    """Together with log-probs and alone, against all logits at once."""
    model = tiny_model(kind)
    _, tensors = one_batch(groups())
    policy = PolicyModel(model, "eager")
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(2, len(tensors.target_T), generator=generator)
    for first in (slopes[0], None):
        model.zero_grad()
        logprobs, entropy = score(policy, tensors, chunks)
        loss = (slopes[1] * entropy).sum()
        if first is not None:
            loss = loss + (first * logprobs).sum()
        loss.backward()
        found = gradients(model)
        model.zero_grad()
        hidden = padded_hidden(policy, tensors, "eager")
        logits = model.get_output_embeddings()(hidden)
        if policy.scale.cap is not None:
            logits = (logits / policy.scale.cap).tanh() * policy.scale.cap
        all_logprobs = (logits / TEMPERATURE).log_softmax(-1)
        expected_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
        loss = (slopes[1] * expected_entropy).sum()
        if first is not None:
            chosen = all_logprobs.gather(1, tensors.target_T[:, None])[:, 0]
            loss = loss + (first * chosen).sum()
        loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
