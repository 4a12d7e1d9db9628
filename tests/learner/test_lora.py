"""Adapters: their gradients, what is published of them, the reference beside them, their files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cohort.learner.adapter_files import (
    check_adapter,
    load_adapter,
    peft_name,
    whole_adapter,
    write_adapter,
)
from cohort.learner.batch import build_micro_batch
from cohort.learner.checkpoint import CheckpointError
from cohort.learner.config import AlgorithmConfig
from cohort.learner.grpo import policy_loss
from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from cohort.learner.lora import (
    LoraLayer,
    LoraProduct,
    adapter_shapes,
    add_adapters,
    chosen_layers,
    lora_layers,
    merge,
    reference_policy,
    take_trained,
)
from cohort.learner.lora_config import LoraConfig
from cohort.learner.packing import Packer
from cohort.learner.plan import plan_step
from cohort.learner.reference import AdapterReference
from cohort.learner.self_check import check_adapters, compile_if_it_works, self_check
from cohort.learner.weights import digest_of, gather_named_weights, weight_specs
from tests.learner.helpers import metas, reference_loss, scored_group, tiny_model

TEMPERATURE = 0.8
LORA = LoraConfig(rank=3, alpha=7.5)
KINDS = ["llama-tied", "qwen2-untied", "gpt2", "gemma2"]


def shake(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter numbers that count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapted(
    kind: str, lora: LoraConfig = LORA, dtype: torch.dtype = torch.float32, **options: Any
) -> PolicyModel:
    policy = PolicyModel(tiny_model(kind).to(dtype), **options)
    add_adapters(policy, lora, seed=5)
    return policy


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def published(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_named_weights(policy.model, 0)}


def groups() -> list[Any]:
    return [
        scored_group("a", [1.0, 0.0, 0.35, None], [3, 11, 6, 5], prompt_tokens=9, truncated=(1,)),
        scored_group("c", [0.0, 1.0, 1.0, 0.0, 2.0], [1, 2, 30, 4, 8], prompt_tokens=2),
    ]


def tensors_of(scored: list[Any]) -> Any:
    plan = plan_step(
        [metas(group) for group in scored],
        AlgorithmConfig(),
        Packer(ranks=1, micro_batch_tokens=8192),
        max_tokens=32,
    )
    [[[batch]]] = plan.updates
    return build_micro_batch(batch, {group.group.id: group for group in scored})


class Plain:
    """The model with merged weights that autograd knows as functions of A and B."""

    def __init__(self, kind: str, policy: PolicyModel) -> None:
        self.model = tiny_model(kind)
        # Gemma's scores are capped, which other kernels leave out.
        self.model.set_attn_implementation("eager")
        self.leaves = {
            name: p.detach().clone().requires_grad_() for name, p in trained(policy.model).items()
        }
        self.weights = {}
        for name, layer in lora_layers(policy.model).items():
            a, b = self.leaves[f"{name}.lora_A"], self.leaves[f"{name}.lora_B"]
            delta = LORA.alpha / LORA.rank * (b @ a)
            delta = delta.T if isinstance(self.model, type(tiny_model("gpt2"))) else delta
            self.weights[f"{name}.weight"] = layer.weight.detach() + delta

    def __call__(self, **given: Any) -> Any:
        return torch.func.functional_call(self.model, self.weights, (), given)


def test_the_product_has_the_gradients_of_its_formula() -> None:
    """In float64, against finite differences."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for transposed in (False, True):
        weight = draw(4, 6).T.contiguous() if transposed else draw(4, 6)
        leaves = [x.requires_grad_() for x in (draw(2, 5, 6), draw(3, 6), draw(4, 3))]

        def call(x: Any, a: Any, b: Any, w: Any = weight, t: bool = transposed) -> Any:
            return LoraProduct.apply(x, w, None, a, b, 0.7, t)

        assert torch.autograd.gradcheck(call, leaves)
        x, a, b = leaves
        plain = weight.T if transposed else weight
        torch.testing.assert_close(call(x, a, b), x @ (plain + 0.7 * b @ a).T)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_plain_model(kind: str, checkpointing: bool) -> None:
    """Of a whole loss; frozen weights have none."""
    policy = adapted(kind, gradient_checkpointing=checkpointing)
    shake(policy.model)
    scored = groups()
    tensors = tensors_of(scored)
    now, _ = policy(tensors, TEMPERATURE)
    loss, _ = policy_loss(tensors.loss_inputs(now), AlgorithmConfig())
    loss.backward()

    plain = Plain(kind, policy)
    expected = reference_loss(plain, scored, temperature=TEMPERATURE)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    norm = sum(float((leaf.grad**2).sum()) for leaf in plain.leaves.values()) ** 0.5
    assert norm > 0.01
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == plain.leaves.keys()
    for name, leaf in plain.leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, atol=2e-5 * norm, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing(kind: str) -> None:
    """And the names, shapes and bytes that are published are the model's."""
    policy, plain = adapted(kind), PolicyModel(tiny_model(kind))
    before = published(plain)
    after = published(policy)
    assert list(after) == list(before)
    assert weight_specs(policy.model, 0) == weight_specs(plain.model, 0)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tensors = tensors_of(groups())
    torch.testing.assert_close(policy(tensors, 1.0)[0], plain(tensors, 1.0)[0])
    # All ranks draw the same.
    again = trained(adapted(kind).model)
    assert all(torch.equal(p, again[name]) for name, p in trained(policy.model).items())
    assert all(float(p.abs().max()) > 0 for name, p in again.items() if name.endswith("A"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_the_learner_computes_with(kind: str, dtype: torch.dtype) -> None:
    """A whole model with the published weights scores as the policy does, to the bit."""
    policy = adapted(kind, dtype=dtype)
    shake(policy.model)
    model = tiny_model(kind).to(dtype)
    model.load_state_dict(published(policy), strict=False)
    tensors = tensors_of(groups())
    found, expected = policy(tensors, 1.0)[0], PolicyModel(model)(tensors, 1.0)[0]
    assert torch.equal(found, expected)


def test_an_update_below_the_resolution_is_in_neither() -> None:
    """In bfloat16 a weight of 1 has no neighbour nearer than 2^-8: learner and engine agree."""
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    one = LoraLayer(layer, LoraConfig(rank=1, alpha=1.0), torch.Generator())
    with torch.no_grad():
        one.lora_A.copy_(torch.tensor([[2.0**-5, 0.0, 0.0, 0.0]]))
        one.lora_B.fill_(2.0**-5)  # their product is 2^-10
    assert torch.equal(one.merged(), layer.weight)
    # The weights cancel: an update that were added by itself would be all that is left.
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert torch.equal(one(x), torch.zeros(1, 4, dtype=torch.bfloat16))
    # The gradient does not stop there.
    one(x).sum().backward()
    assert one.lora_B.grad is not None
    assert float(one.lora_B.grad.abs().min()) > 0
    with torch.no_grad():
        one.lora_A.fill_(0.25)
    assert float(one.merged()[0, 0]) == 1 + 2.0**-7
    assert torch.equal(one.merged(), one(torch.eye(4, dtype=torch.bfloat16)).t())


def test_merging_adds_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, a, b = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 30), (8, 30), (40, 8))
    )
    exact = (weight.double() + 0.25 * b.double() @ a.double()).float().bfloat16()
    found = merge(weight, a, b, 0.25, transposed=False)
    assert (found != exact).sum() <= 1
    assert torch.equal(merge(weight.T, a, b, 0.25, transposed=True), found.T)


def forward_of(policy: PolicyModel) -> Any:
    return policy.__call__


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_the_reference_is_the_policy_without_adapters(kind: str, tmp_path: Path) -> None:
    """Until it is refreshed; then it has those of that time, in a resumed run too."""
    policy, plain = adapted(kind), PolicyModel(tiny_model(kind))
    shake(policy.model)
    tensors = tensors_of(groups())
    own = policy(tensors, 1.0)[0].detach()
    original = plain(tensors, 1.0)[0].detach()
    reference = AdapterReference(policy.model, forward_of(policy), 0, "digest")
    torch.testing.assert_close(reference.logprobs(tensors, 1.0, 1), original)
    assert float((own - original).abs().max()) > 0.05
    assert torch.equal(policy(tensors, 1.0)[0], own)

    assert not reference.refreshed
    reference.become(policy.model)
    shake(policy.model, seed=2)
    moved = policy(tensors, 1.0)[0].detach()
    torch.testing.assert_close(reference.logprobs(tensors, 1.0, 1), own)
    assert float((moved - own).abs().max()) > 0.05
    reference.save(tmp_path, write=True)

    later = adapted(kind)
    resumed = AdapterReference(later.model, forward_of(later), 0, "digest")
    resumed.load(tmp_path / "nothing")
    assert not resumed.refreshed
    resumed.load(tmp_path)
    assert resumed.refreshed
    torch.testing.assert_close(resumed.logprobs(tensors, 1.0, 1), own)


def test_the_policy_comes_back_when_the_reference_fails() -> None:
    policy = adapted("llama-tied")
    with pytest.raises(RuntimeError, match="out of memory"), reference_policy(policy.model):
        assert all(layer.as_reference for layer in lora_layers(policy.model).values())
        raise RuntimeError("out of memory")
    assert not any(layer.as_reference for layer in lora_layers(policy.model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_saved_and_loaded(kind: str) -> None:
    """Of a tied embedding neither name; the model inside still has everything."""
    policy = adapted(kind)
    shake(policy.model)
    saved = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    assert {f"model.{name}" for name in trained(policy.model)} == saved.keys()
    assert set(tiny_model(kind).state_dict()) < set(policy.model.state_dict())
    other = adapted(kind)
    take_trained(saved, other)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in saved.items())
    assert all(torch.equal(t, published(other)[n]) for n, t in published(policy).items())


def test_a_state_with_other_adapters_is_refused() -> None:
    policy = adapted("llama-tied")
    few = adapted("llama-tied", LoraConfig(rank=3, alpha=7.5, targets=["q_proj"]))
    for source, target in ((few, policy), (policy, few)):
        with pytest.raises(ValueError, match=r"other adapters \(model\.lora\): model"):
            take_trained(source.state_dict(), target)


@pytest.mark.parametrize(
    ("kind", "targets", "names"),
    [
        ("llama-tied", [], "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("gpt2", [], "c_attn c_fc c_proj"),
        ("llama-tied", ["v_proj", "mlp.up_proj"], "up_proj v_proj"),
        ("qwen2-untied", ["lm_head"], "lm_head"),
        ("gpt2", ["attn.c_proj"], "c_proj"),
    ],
)
def test_which_layers_get_adapters(kind: str, targets: list[str], names: str) -> None:
    chosen = chosen_layers(tiny_model(kind), LoraConfig(targets=targets))
    assert " ".join(sorted({name.rpartition(".")[2] for name in chosen})) == names
    layers = [name for name in chosen if ".1." in name or name == "lm_head"]
    assert 2 * len(layers) == len(chosen) or chosen.keys() == {"lm_head"}
    if targets == ["attn.c_proj"]:
        assert all("mlp" not in name for name in chosen)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama-tied", ["q_proj", "w_q"], r"LlamaForCausalLM has no linear layer w_q; it"),
        ("gpt2", ["q_proj"], r".* no linear layer q_proj; it has c_attn, c_fc, c_proj, lm_head"),
        ("llama-tied", ["embed_tokens"], r".* no linear layer embed_tokens"),
        ("llama-tied", ["roj"], r".* no linear layer roj"),
        ("llama-tied", ["lm_head"], r"lm_head has no weights of its own .*embed_tokens.* one\)"),
    ],
)
def test_targets_that_cannot_be(kind: str, targets: list[str], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"^model\.lora\.targets: {message}"):
        chosen_layers(tiny_model(kind), LoraConfig(targets=targets))


@pytest.mark.slow  # the first compilation of a process
def test_the_start_tries_the_adapters() -> None:
    policy = PolicyModel(tiny_model("llama-tied"))
    self_check(policy, TEMPERATURE)
    add_adapters(policy, LORA, seed=0)
    check_adapters(policy, TEMPERATURE)
    compile_if_it_works(policy, TEMPERATURE, required=True, backend="eager")


def test_a_layer_whose_weight_is_read_elsewhere_is_refused() -> None:
    policy = PolicyModel(tiny_model("llama-tied"))
    mlp = policy.model.model.layers[1].mlp

    def beside_it(x: torch.Tensor) -> torch.Tensor:
        return x @ mlp.up_proj.weight.T @ mlp.down_proj.weight.T

    mlp.forward = beside_it
    add_adapters(policy, LoraConfig(targets=["up_proj"]), seed=0)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj of Llama.* no part"):
        check_adapters(policy, TEMPERATURE)


def state_of(policy: PolicyModel, lora: LoraConfig, base: str) -> Any:
    learner = SimpleNamespace(zero_stage=0)
    spec = SimpleNamespace(learner=learner, rank=0, lora=lora, model_path="org/m", dtype="float32")
    return SimpleNamespace(model=policy.model, spec=spec, base=base)


def write(policy: PolicyModel, lora: LoraConfig, base: str, folder: Path) -> None:
    state = state_of(policy, lora, base)
    write_adapter(state, whole_adapter(state), folder)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_an_adapter_goes_through_pefts_files(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = digest_of(tiny_model(kind))
    policy = adapted(kind)
    # Adapters are no part of what a digest is taken of.
    assert digest_of(policy.model) == base
    shake(policy.model)
    write(policy, LORA, base, tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["peft_type"], facts["r"], facts["lora_alpha"]) == ("LORA", 3, 7.5)
    assert facts["base_model_name_or_path"] == "org/m"
    assert facts["fan_in_fan_out"] == (kind == "gpt2")
    linear = {name.rpartition(".")[2] for name in lora_layers(policy.model)}
    assert set(facts["target_modules"]) == linear
    # PEFT's formula, from its file.
    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in lora_layers(policy.model).items():
        a, b = (file[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        delta = facts["lora_alpha"] / facts["r"] * b @ a
        expected = layer.weight + (delta.T if facts["fan_in_fan_out"] else delta)
        torch.testing.assert_close(layer.merged(), expected)
    assert len(file) == 2 * len(lora_layers(policy.model))

    other = adapted(kind)
    check_adapter(tmp_path, LORA, adapter_shapes(tiny_model(kind), LORA))
    load_adapter(other.model, tmp_path, "float32", base)
    assert all(torch.equal(t, published(other)[n]) for n, t in published(policy).items())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = adapted("llama-tied")
    write(policy, LORA, "this", tmp_path)
    shapes = adapter_shapes(tiny_model("llama-tied"), LORA)
    for lora, message in (
        (LoraConfig(rank=4, alpha=7.5), r"rank=3 and model\.lora\.alpha=7\.5; this run .*rank=4"),
        (LoraConfig(rank=3, alpha=8.0), r"this run has model\.lora\.rank=3 .*alpha=8\.0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_adapter(tmp_path, lora, adapter_shapes(tiny_model("llama-tied"), lora))
    with pytest.raises(CheckpointError, match=r"another model, or of other model\.lora\.targets"):
        check_adapter(tmp_path, LORA, {k: v for k, v in shapes.items() if "q_proj" in k})
    with pytest.raises(CheckpointError, match=r"another model.* is \(48, 3\) there and \(9, 3\)"):
        check_adapter(tmp_path, LORA, {k: (9, 3) if v == (48, 3) else v for k, v in shapes.items()})
    with pytest.raises(CheckpointError, match=r"model\.init_from=.*set model\.path to the model"):
        load_adapter(policy.model, tmp_path, "float32", "that")
    # In another precision the digests say nothing.
    load_adapter(policy.model, tmp_path, "bfloat16", "that")
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**facts, "use_dora": True}))
    with pytest.raises(CheckpointError, match="another kind of adapter"):
        check_adapter(tmp_path, LORA, shapes)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="no whole adapter"):
        check_adapter(tmp_path, LORA, shapes)


def test_peft_names() -> None:
    assert peft_name("h.0.lora_A") == "base_model.model.h.0.lora_A.weight"
