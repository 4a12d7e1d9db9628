"""The attention for GPUs, uncompiled: its masks, its output and gradients, what it allocates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torchs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cohort.learner import flex
from cohort.learner.attention import Tree, TreeAttention
from cohort.learner.batch import build_micro_batch
from cohort.learner.flex import Intervals, block_mask
from cohort.learner.logprobs import PolicyModel, UnsupportedModel
from cohort.learner.packing import RowCost
from cohort.learner.self_check import self_check
from cohort.learner.setup import _facts
from cohort.learner.shapes import Join, RowShape, padded_length
from tests.learner.helpers import tiny_model
from tests.learner.test_attention import TREES
from tests.learner.test_episodes import ALL_IN_ONE, batches, expected_logprobs, mixed
from tests.pace import some

CPU = torch.device("cpu")
DEEP = RowShape(
    9, (7, 4, 0, 5, 3), (Join(None, 9), Join(0, 12), Join(1, 14), Join(2, 11), Join(None, 4))
)
CASES = {**TREES, "deep": Tree((DEEP, RowShape(3, (2,)), DEEP))}


@pytest.fixture(autouse=True)
def gradients_on_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses them before it looks, though what it computes uncompiled has them."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of a test have several blocks."""
    monkeypatch.setattr(flex, "BLOCK", 4)


def length_of(tree: Tree, multiple: int) -> int:
    return padded_length(sum(row.length for row in tree.rows), multiple)


def one_mask(tree: Tree, length: int) -> torch.Tensor:
    """[L, L] bool, of rows that lie one after another, from the mask of each row by itself."""
    mask = torch.eye(length, dtype=torch.bool)
    start = 0
    for row in tree.rows:
        own = slice(start, start + row.length)
        mask[own, own] = Tree((row,)).mask(row.length, CPU)[0, 0]
        start += row.length
    return mask


def random_row(generator: random.Random) -> RowShape:
    """Branches that continue any earlier branch, from any of its tokens; some have no tokens."""
    prompt = generator.randint(1, 12)
    branches: list[int] = []
    joins: list[Join] = []
    ends: list[int] = []
    for index in range(generator.randint(0, 7)):
        parent = generator.choice([None, *range(index)])
        there = prompt if parent is None else ends[parent]
        kept = generator.choice([there, there, generator.randint(0, there)])
        branches.append(generator.choice([0, 1, 3, generator.randint(1, 20)]))
        joins.append(Join(parent, kept))
        ends.append(kept + branches[-1])
    return RowShape(prompt, tuple(branches), tuple(joins))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.usefixtures("small_blocks")
def test_masks_and_blocks_are_those_of_the_tree(seed: int, window: int | None) -> None:
    generator = random.Random(seed)
    tree = Tree(tuple(random_row(generator) for _ in range(generator.randint(1, 4))))
    length = length_of(tree, 8)
    intervals = Intervals.of(tree, length)
    expected = one_mask(tree, length)
    assert torch.equal(intervals.depth_N + 1, expected.sum(1).int())
    if window is not None:
        depth = intervals.depth_N
        expected &= depth[:, None] - depth < window
    mask = block_mask(intervals, CPU, window)
    q, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    none = torch.zeros(())
    assert torch.equal(mask.mask_mod(none, none, q, k), expected)
    # Every visible pair is in a block that is looked at; whole blocks hide nothing.
    pairs = expected.view(length // 4, 4, length // 4, 4)
    some, all_of = pairs.any(3).any(1), pairs.all(3).all(1)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    looked_at = listed(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(whole, all_of)
    assert not (whole & looked_at).any()
    assert not (some & ~whole & ~looked_at).any()


@pytest.mark.usefixtures("small_blocks")
def test_few_blocks_are_looked_at_in_vain() -> None:
    """Only those in which parts of several branches meet."""
    needed = looked_at = 0
    for seed in range(40):
        generator = random.Random(seed)
        tree = Tree(tuple(random_row(generator) for _ in range(generator.randint(1, 4))))
        length = length_of(tree, 8)
        mask = block_mask(Intervals.of(tree, length), CPU)
        assert mask.full_kv_num_blocks is not None
        looked_at += int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        needed += int(one_mask(tree, length).view(length // 4, 4, -1, 4).any(3).any(1).sum())
    assert needed <= looked_at <= 1.25 * needed


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[Q, K] bool: which blocks of keys each block of queries has."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, order[:count].long()] = True
    return found


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("kv_heads", some([2, 4, 1], 3))
@pytest.mark.usefixtures("small_blocks")
def test_output_and_gradients_equal_those_of_the_tree(name: str, kv_heads: int) -> None:
    tree, heads, size = CASES[name], 4, 16
    used, length = sum(row.length for row in tree.rows), length_of(CASES[name], 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(n, length, size, generator=generator) * 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    slopes = torch.randn(used, heads, size, generator=generator)
    mask = block_mask(Intervals.of(tree, length), CPU)
    found, _ = flex.flex_attention_forward(
        torch.nn.Identity(), q[None], k[None], v[None], mask, scaling=0.3
    )
    expected = TreeAttention(tree, q)(q, k, v, 0.3)
    torch.testing.assert_close(found[0, :used], expected[:used], atol=1e-5, rtol=1e-5)
    mine, theirs = (
        torch.autograd.grad((out[:used] * slopes).sum(), (q, k, v)) for out in (found[0], expected)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", some(["gemma3", "llama-tied", "qwen2-untied", "mistral-sliding", "granite"], 5)
)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_models_score_and_train_as_with_single_sequences(
    kind: str, gradient_checkpointing: bool
) -> None:
    model, groups = tiny_model(kind), mixed()
    policy = PolicyModel(model, "flex", gradient_checkpointing)
    [batch] = batches(groups, cost=ALL_IN_ONE)
    tensors = build_micro_batch(batch, {group.group.id: group for group in groups})
    logprobs, _ = policy(tensors, 0.7, 2)
    slopes = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    (logprobs * slopes).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    by_id = expected_logprobs(model, groups)
    expected = torch.cat([by_id[segment.completion_id] for segment in batch.segments])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    (expected * slopes).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-5, msg=name)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


@pytest.mark.parametrize("window", [None, 1024])
def test_no_tensor_of_all_pairs_is_made(window: int | None) -> None:
    tree = Tree((RowShape(24_000, (1_000,) * 8), DEEP))
    length = length_of(tree, flex.FLEX_MULTIPLE)
    with Largest() as largest:
        mask = block_mask(Intervals.of(tree, length), CPU, window)
    assert length > 32_000
    assert largest.numbers <= max(3 * length, 2 * (length // flex.BLOCK) ** 2)
    assert mask.sparsity() > 50
    with Largest() as all_pairs:
        Tree((RowShape(300),)).mask(300, CPU)
    assert all_pairs.numbers == 300**2


def test_a_gpu_takes_it_and_a_cpu_refuses_it() -> None:
    policy = PolicyModel(tiny_model("llama-tied"))
    cuda = torch.device("cuda")
    assert (policy.kernel(CPU), policy.kernel(cuda)) == ("tree", "flash")
    # The flash kernels are not given windows.
    assert policy.kernel(cuda, window_bites=True) == "flex"
    facts = _facts(policy, cuda, 1000)
    assert (facts.masked_attention, facts.length_multiple) == (False, flex.FLEX_MULTIPLE)
    policy.can_flash = False
    assert policy.kernel(cuda) == "flex"
    facts = _facts(policy, cuda, 1000)
    assert (facts.masked_attention, facts.length_multiple) == (False, flex.FLEX_MULTIPLE)
    policy.can_flex = False
    assert policy.kernel(cuda) == "masked"
    assert _facts(policy, cuda, 1000).masked_attention
    # Rows of the tree attention lie one after another wherever they are computed.
    assert not _facts(PolicyModel(tiny_model("llama-tied"), "tree"), cuda, 1000).masked_attention
    with pytest.raises(UnsupportedModel, match=r"learner\.attention=flex .* CPUs; use auto"):
        self_check(PolicyModel(tiny_model("llama-tied"), "flex"), 0.7)
    with pytest.raises(UnsupportedModel, match="attention scores"):
        PolicyModel(tiny_model("gemma2"), "flex")


def test_the_plan_counts_the_padding_of_flex() -> None:
    [batch] = batches(mixed(), cost=RowCost(0.0, masked=False, multiple=flex.FLEX_MULTIPLE))
    assert batch.padded_tokens == flex.FLEX_MULTIPLE > sum(row.length for row in batch.rows)
