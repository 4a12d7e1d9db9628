"""The three-part attention of shared-prompt rows, against one softmax under the full mask."""

from __future__ import annotations

import pytest
import torch

from cohort.learner.attention import RowShape, Tree, TreeAttention

TREES = {
    "even": Tree((RowShape(5, (3, 3, 3)), RowShape(2, (6, 6)))),
    "uneven": Tree((RowShape(5, (1, 7, 4)), RowShape(9, (2,)), RowShape(1, (3, 1)))),
    "prompt alone": Tree((RowShape(7),)),
    "one completion": Tree((RowShape(4, (9,)), RowShape(1, (3,)))),
}


@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
# Every row in parts, in small blocks; rows of more than eight tokens in parts; all under a mask.
@pytest.mark.parametrize(("masked", "block"), [(0, 3), (0, 512), (8, 3), (512, 512)])
@pytest.mark.parametrize("padding", [0, 6])
def test_output_and_gradients_equal_the_masked_softmax(
    name: str, kv_heads: int, masked: int, block: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cohort.learner.attention.MASKED_ROW_LENGTH", masked)
    monkeypatch.setattr("cohort.learner.attention.CAUSAL_BLOCK", block)
    tree, heads, dim = TREES[name], 4, 8
    used = sum(row.length for row in tree.rows)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        # Large scores: a wrong normaliser shows.
        shape = (count, used + padding, dim)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).requires_grad_()

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    slopes = torch.randn(used + padding, heads, dim, generator=generator, dtype=torch.float64)

    found = TreeAttention(tree, q)(q, k, v, 0.3)
    gradients = torch.autograd.grad((found * slopes).sum(), (q, k, v))

    # Everything over everything, under one mask with a block for each row.
    hidden = torch.ones(used, used, dtype=torch.bool)
    start = 0
    for row in tree.rows:
        rows = slice(start, start + row.length)
        hidden[rows, rows] = ~Tree((row,)).mask(row.length, q.device)[0, 0]
        start += row.length
    repeats = heads // kv_heads
    keys, values = (x[:, :used].repeat_interleave(repeats, dim=0) for x in (k, v))
    scores = (q[:, :used] @ keys.transpose(1, 2) * 0.3).masked_fill(hidden, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(found[:used], expected, atol=1e-6, rtol=1e-6)
    assert not found[used:].any()
    wanted = torch.autograd.grad((expected * slopes[:used]).sum(), (q, k, v))
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_mask_of_a_tree() -> None:
    mask = Tree((RowShape(2, (1, 2)),)).mask(6, torch.device("cpu"))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_places_of_tokens_in_padded_rows() -> None:
    tree = Tree((RowShape(2, (1,)), RowShape(1), RowShape(1, (1, 2))))
    assert tree.longest == 4
    places = tree.places(5, torch.device("cpu"))
    assert places.tolist() == [0, 1, 2, 5, 10, 11, 12, 13]


@pytest.mark.parametrize("masked", [0, 256])
def test_half_precision_stays_close(masked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cohort.learner.attention.MASKED_ROW_LENGTH", masked)
    tree = TREES["uneven"]
    tokens = sum(row.length for row in tree.rows)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, tokens, 16, generator=generator) for _ in range(3))
    exact = TreeAttention(tree, q)(q, k, v, 0.25)
    rough = [x.bfloat16() for x in (q, k, v)]
    found = TreeAttention(tree, rough[0])(*rough, 0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.03)
