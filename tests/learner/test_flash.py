"""Tree attention by flash kernels: how rows are cut, what is merged, gradients, compiled layers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs

from cohort.learner import flash, output_layer
from cohort.learner.attention import Tree, TreeAttention
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import LearnerConfig
from cohort.learner.flash import Parts, cut, tree_flash
from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from cohort.learner.output_layer import LogitScale, TokenScores
from cohort.learner.self_check import compile_if_it_works, self_check
from cohort.learner.shapes import Join, RowShape
from tests.learner.helpers import scored_group, tiny_model
from tests.learner.test_episodes import ALL_IN_ONE, batches, expected_logprobs, mixed
from tests.learner.test_flex import CASES, CPU, length_of, one_mask, random_row
from tests.pace import some

SEEDS = range(30)


def random_tree(seed: int) -> Tree:
    generator = random.Random(seed)
    return Tree(tuple(random_row(generator) for _ in range(generator.randint(1, 4))))


TREES = {**CASES, **{f"random {seed}": random_tree(seed) for seed in SEEDS[::3]}}


def draw(length: int, heads: int, kv_heads: int, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(length, n, size, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_gradients_equal_those_of_the_tree(name: str, kv_heads: int) -> None:
    tree, heads = TREES[name], 4
    used, length = sum(row.length for row in tree.rows), length_of(tree, 8)
    q, k, v = draw(length, heads, kv_heads)
    slopes = torch.randn(used, heads, 16, generator=torch.Generator().manual_seed(1))
    parts = Parts.of(tree, length, CPU)
    found, lse = tree_flash(q, k, v, parts.places, parts.sizes, 0.3)
    by_head = [x.transpose(0, 1) for x in (q, k, v)]
    expected = TreeAttention(tree, q)(by_head[0], by_head[1], by_head[2], 0.3)
    torch.testing.assert_close(found[:used], expected[:used], atol=1e-5, rtol=1e-5)
    scores = by_head[0] @ by_head[1].repeat_interleave(heads // kv_heads, 0).mT * 0.3
    hidden = ~one_mask(tree, length)
    whole = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse[:, :used], whole[:, :used], atol=1e-5, rtol=1e-5)
    mine, theirs = (
        torch.autograd.grad((out[:used] * slopes).sum(), (q, k, v)) for out in (found, expected)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_visible_pair_is_in_one_part(seed: int) -> None:
    """And no pair is in two, and none that is hidden in any."""
    for row in random_tree(seed).rows:
        times = torch.zeros(row.length, row.length, dtype=torch.int64)
        own, continued = cut(row)
        for start, stop in own:
            times[start:stop, start:stop] += torch.ones(stop - start, stop - start).tril().long()
        for (start, stop), keys in continued:
            for first, last in keys:
                times[start:stop, first:last] += 1
        assert torch.equal(times, one_mask(Tree((row,)), row.length).long())


def test_flat_rows_are_views_and_siblings_one_sequence() -> None:
    own, continued = cut(RowShape(8, (2, 3, 0, 4)))
    # The first completion goes on where the prompt ends.
    assert own == [(0, 10), (10, 13), (13, 17)]
    assert continued == [((10, 17), [(0, 8)])]
    parts = Parts.of(Tree((RowShape(8, (2, 3, 0, 4)),)), 17, CPU)
    assert parts.sizes[3:5].tolist() == [0, 0]  # nothing is copied
    assert parts.sizes[-4:].tolist() == [10, 17, 0, 8]
    assert cut(RowShape(8, (5,))) == ([(0, 13)], [])
    chain = RowShape(4, (3, 2, 6), (Join(None, 4), Join(0, 7), Join(1, 5)))
    assert cut(chain) == ([(0, 9), (9, 15)], [((9, 15), [(0, 5)])])


def test_half_precision_stays_close() -> None:
    tree = CASES["deep"]
    length = length_of(tree, 8)
    q, k, v = (x.detach() for x in draw(length, 4, 2))
    parts = Parts.of(tree, length, CPU)
    exact, _ = tree_flash(q, k, v, parts.places, parts.sizes, 0.25)
    rough = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    found, lse = tree_flash(rough[0], rough[1], rough[2], parts.places, parts.sizes, 0.25)
    assert (found.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), exact, atol=0.04, rtol=0.04)
    every = (found, *rough, found, lse, parts.places, parts.sizes, 0.25)
    assert {x.dtype for x in flash.tree_flash_backward(*every)} == {torch.bfloat16}


def test_the_operators_are_what_torch_expects_of_operators() -> None:
    tree = CASES["deep"]
    parts = Parts.of(tree, length_of(tree, 8), CPU)
    q, k, v = draw(length_of(tree, 8), 4, 2)
    torch.library.opcheck(flash.tree_flash, (q, k, v, parts.places, parts.sizes, 0.3))


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Traces as on GPUs, and counts what is traced anew; generates no code."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    output_layer._compiled.cache_clear()
    compile_it = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda body, **how: compile_it(body, **{"backend": "aot_eager", **how})
    )
    yield counter
    output_layer._compiled.cache_clear()
    torch._dynamo.reset()


def scored(policy: PolicyModel, groups: Any) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """Segments, log-probs and gradients of all groups in one micro-batch."""
    [batch] = batches(groups, cost=ALL_IN_ONE)
    tensors = build_micro_batch(batch, {group.group.id: group for group in groups})
    logprobs, entropy = policy(tensors, 0.7, 2)
    slopes = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    (logprobs * slopes + 0.1 * entropy * slopes).mean().backward()
    found = {name: p.grad for name, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    return batch.segments, logprobs.detach(), found


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        ("llama-tied", False), ("qwen2-untied", False), ("gemma3", False), ("granite", False),
        pytest.param("qwen2-untied", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_models_score_and_train_as_with_single_sequences(
    kind: str, gradient_checkpointing: bool, compiled: bool, compilers: Any
) -> None:
    model, groups = tiny_model(kind), mixed()
    if kind == "gemma3":
        model.config.sliding_window = 1000  # hides nothing
    _, plain, wanted = scored(PolicyModel(model, "tree"), groups)
    policy = PolicyModel(model, "flash", gradient_checkpointing)
    if compiled:
        policy.compile_parts(compilers)
    segments, logprobs, found = scored(policy, groups)
    for name, p in found.items():
        torch.testing.assert_close(p, wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(logprobs, plain, atol=1e-5, rtol=1e-5)
    if not compiled:
        model.set_attn_implementation("eager")
        by_id = expected_logprobs(model, groups)
        expected = torch.cat([by_id[segment.completion_id] for segment in segments])
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # a compiler
@pytest.mark.parametrize(
    ("attention", "gradient_checkpointing"), [("flash", False), ("flash", True), ("flex", False)]
)
def test_layers_are_compiled_once_for_all_lengths(
    attention: Any, gradient_checkpointing: bool, compilers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)  # see test_flex.py
    policy = PolicyModel(tiny_model("qwen2-untied"), attention, gradient_checkpointing)
    policy.compile_parts(compilers)
    counts = []
    for prompt, sizes in [(300, [20, 30, 400]), (6, [3, 9]), (9, [7, 100]), (40, [200])]:
        scored(policy, [scored_group("a", [1.0, 0.0, 0.5][: len(sizes)], sizes, prompt)])
        counts.append(compilers.frame_count)
    assert 1 <= counts[0] <= 2  # few for all layers, and none for other lengths
    assert counts == counts[:1] * 4


def test_windows_are_left_to_masks() -> None:
    """On GPUs to flex: see test_flex.py."""
    model, groups = tiny_model("mistral-sliding"), mixed()
    _, plain, wanted = scored(PolicyModel(model, "sdpa"), groups)
    policy = PolicyModel(model, "flash")
    policy.can_flex = False
    assert policy.kernel(CPU) == "flash"
    _, logprobs, found = scored(policy, groups)
    torch.testing.assert_close(logprobs, plain, atol=1e-5, rtol=1e-5)
    for name, p in found.items():
        torch.testing.assert_close(p, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def test_the_check_falls_back_from_what_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = PolicyModel(tiny_model("llama-tied"), "flash")
    self_check(policy, 0.7)
    assert policy.can_flash

    def refuse(*_: Any) -> None:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setattr(flash, "_plain_forward", refuse)
    monkeypatch.setattr("cohort.learner.logprobs.AUTO", {"cpu": "flash"})
    policy = PolicyModel(tiny_model("llama-tied"))
    self_check(policy, 0.7)
    assert (policy.can_flash, policy.kernel(CPU), policy.shares_prompts) == (False, "masked", True)
    assert "flash failed with RuntimeError: FlashAttention only support" in caplog.text


@pytest.mark.slow
def test_what_cannot_be_compiled_is_not_compiled(
    compilers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no code for this machine")

    groups, policy = mixed(), PolicyModel(tiny_model("llama-tied"), "flash")
    plain = scored(policy, groups)[1]
    with pytest.raises(UnsupportedModel, match=r"learner\.compile=on cannot be used.*no code for"):
        compile_if_it_works(policy, 0.7, required=True, backend=broken)
    compile_if_it_works(policy, 0.7, required=False, backend=broken)
    assert "slower (learner.compile): it failed with" in caplog.text
    assert torch.equal(scored(policy, groups)[1], plain)
    assert not policy.fuses_scores
    compile_if_it_works(policy, 0.7, required=True, backend=compilers)
    assert policy.fuses_scores and compilers.frame_count


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("scale", some([LogitScale(2.0, 3.0), LogitScale(), LogitScale(0.5)], 3))
def test_fused_scores_equal_those_in_blocks(scale: LogitScale, entropies: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 40, 64):
        outputs = (torch.randn(64, 97, generator=generator) * 4).requires_grad_()
        target = torch.randint(97, (tokens,), generator=generator)
        slopes = torch.randn(2, tokens, generator=generator)
        found = []
        for fused in (False, True):
            logprobs, entropy = TokenScores.apply(outputs, target, scale, 0.7, fused)
            loss = (logprobs * slopes[0]).sum() + entropies * (entropy * slopes[1]).sum()
            (gradient,) = torch.autograd.grad(loss, outputs)
            found.append((logprobs, entropy, gradient))
        torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=2e-5)


def test_what_is_compiled() -> None:
    assert LearnerConfig().compiles("cuda")
    assert not LearnerConfig().compiles("cpu")
    assert not LearnerConfig(zero_stage=3).compiles("cuda")
    assert not LearnerConfig(compile="off").compiles("cuda")
    assert LearnerConfig(compile="on").compiles("cpu")
    [problem] = LearnerConfig(compile="on", zero_stage=3).contradictions()
    assert "learner.compile=on needs whole parameters" in problem
