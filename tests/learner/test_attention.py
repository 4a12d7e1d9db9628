"""The three-part attention of shared-prompt rows, against one softmax under the full mask."""

from __future__ import annotations

import pytest
import torch

from learner.attention import RowShape, Tree, tree_attention

TREES = {
    "even": Tree((RowShape(5, (3, 3, 3)), RowShape(2, (6, 6))), 14),
    "uneven": Tree((RowShape(5, (1, 7, 4)), RowShape(9, (2,)), RowShape(1, (3, 1))), 20),
    "prompt alone": Tree((RowShape(7),), 7),
    "one completion": Tree((RowShape(4, (9,)), RowShape(1, (3,))), 14),
    "padded": Tree((RowShape(3, (2, 5)), RowShape(4, (1,))), 32),
}


@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [3, 512])
def test_output_and_gradients_equal_the_masked_softmax(
    name: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.attention.CAUSAL_BLOCK", block)
    tree, heads, dim = TREES[name], 4, 8
    generator = torch.Generator().manual_seed(0)
    rows = len(tree.rows)

    def draw(count: int) -> torch.Tensor:
        # Large scores: a wrong normaliser shows.
        shape = (rows, count, tree.length, dim)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).requires_grad_()

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    used = torch.zeros(rows, tree.length, 1, 1)
    for b, row in enumerate(tree.rows):
        used[b, : row.prompt + sum(row.completions)] = 1
    slopes = torch.randn(rows, tree.length, heads, dim, generator=generator, dtype=torch.float64)
    slopes = slopes * used

    found = tree_attention(q, k, v, tree, 0.3)
    gradients = torch.autograd.grad((found * slopes).sum(), (q, k, v))

    repeats = heads // kv_heads
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q @ keys.transpose(2, 3) * 0.3).masked_fill(~tree.mask(q.device), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found, expected * used, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad((expected * slopes).sum(), (q, k, v))
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_mask_of_a_tree() -> None:
    mask = Tree((RowShape(2, (1, 2)),), 6).mask(torch.device("cpu"))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_half_precision_stays_close() -> None:
    tree = TREES["uneven"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, tree.length, 16, generator=generator) for _ in range(3))
    exact = tree_attention(q, k, v, tree, 0.25)
    rough = tree_attention(*(x.bfloat16() for x in (q, k, v)), tree, 0.25)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.03, rtol=0.03)
