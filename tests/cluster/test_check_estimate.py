"""The arithmetic of `cohort check`, against numbers worked out by hand and against torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cohort.cluster.commands.check.estimate import (
    Architecture,
    activation_bytes,
    expected_equal,
    histogram,
    histogram_lines,
    kv_bytes_per_token,
    logit_bytes,
    two_valued,
    wilson,
)
from cohort.cluster.commands.check.model import read_architecture
from cohort.cluster.observe.metrics import quantile
from tests.models import tiny_gpt2, tiny_llama, tiny_qwen2

# SmolLM2-135M.
SMOL = Architecture(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head=64, vocabulary=49152
)


def test_bytes_of_a_known_model() -> None:
    # 2 (keys, values) x 30 layers x 3 heads x 64 x 2 bytes.
    assert kv_bytes_per_token(SMOL, 2) == 23040
    # Norms 576 x 16; q, k, v, output 2 x (3 x 576 + 2 x 192); MLP 4 x 2 x 1536; 30 layers.
    layer = 9216 + 4224 + 12288
    assert activation_bytes(SMOL, 2, 10) == 10 * 30 * layer
    assert activation_bytes(SMOL, 2, 10, checkpointing=True) == 10 * (layer + 30 * 576 * 2)
    assert logit_bytes(SMOL, 2, 1024) == 2 * 2 * 1024 * 49152


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_activations_are_what_autograd_saves(
    make: Callable[[Path], Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(tokens)[None])
    architecture = read_architecture(str(folder))
    assert architecture is not None
    estimate = activation_bytes(architecture, dtype.itemsize, tokens)
    assert sum(storage.nbytes() for storage in saved.values()) == pytest.approx(estimate, rel=0.15)


def test_a_histogram_holds_every_value_once() -> None:
    assert histogram([7, 7, 7]) == [(7, 7, 3)]
    assert histogram([1, 2, 3, 10], bins=2) == [(1, 5, 3), (6, 10, 1)]
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.randint(1, rng.randint(1, 9000)) for _ in range(rng.randint(1, 40))]
        rows = histogram(values)
        assert len(rows) <= 8
        assert rows[0][0] == min(values) and rows[-1][1] == max(values)
        for first, last, count in rows:
            assert count == sum(first <= value <= last for value in values)
    lines = histogram_lines([1, 1, 1, 16])
    assert lines[0].split() == ["1-2", "#" * 30, "3"]
    assert lines[-1].split() == ["15-16", "#" * 10, "1"]


def test_quantiles_are_values_that_are_there() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(list(range(1, 101)), 0.95) == 95
    assert quantile([5], 0.95) == 5


def test_wilson_s_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson(8, 8)
    assert high == 1.0 and low == pytest.approx(0.6756, abs=1e-3)


def test_expected_groups_without_signal() -> None:
    # One completion is always equal to itself.
    assert expected_equal([(1, 8), (5, 8)], 1) == pytest.approx(1)
    # Every prompt passes half of the time: 2 / 2^8.
    assert expected_equal([(4, 8)] * 200, 8) == pytest.approx(2 / 256, rel=0.5)
    # Prompts that always or never pass, and never in between.
    assert expected_equal([(8, 8), (0, 8)] * 50, 8) > 0.95
    # Nothing seen passing, little or much of it.
    assert expected_equal([(0, 8)] * 100, 8) > 0.98
    assert 0.8 < expected_equal([(0, 8)] * 4, 8) < 0.98
    # Larger groups are never worse.
    sizes = [expected_equal([(0, 8), (2, 8), (1, 8)], size) for size in (2, 4, 8, 16, 32)]
    assert sizes == sorted(sizes, reverse=True)


def test_expected_groups_without_signal_of_a_known_distribution() -> None:
    # Pass rates uniform: the integral of p^n + (1-p)^n is 2 / (n + 1). Binomial counts under
    # uniform rates are uniform on 0..n.
    passed = [(count, 8) for count in range(9)] * 30
    for size in (2, 8, 16):
        assert expected_equal(passed, size) == pytest.approx(2 / (size + 1), rel=0.1)


def test_rewards_with_two_values() -> None:
    assert two_valued([[1.0, -1.0, None], [-1.0, -1.0, 1.0]]) == [(1, 2), (1, 3)]
    assert two_valued([[0.0, 0.0]]) == [(2, 2)]
    assert two_valued([[0.0, 0.5, 1.0]]) is None
    assert two_valued([[None, None]]) is None
    assert two_valued([[None], [1.0, 0.0]]) == [(1, 2)]
