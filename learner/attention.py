"""Attention over rows in which several completions share one prompt.

A completion's token attends to the prompt and to what came before it in its own completion. As a
mask over a row of L tokens that is L * L scores, most of them hidden when completions are many.
Here only the parts that are not hidden are computed: the prompt over itself, all completions over
the prompt, every completion over itself; the last two share a softmax. They are plain matrix
products: torch's fused attention for CPUs takes two to twenty times as long on such parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

TREE = "cohort_tree"
# Queries of a plain sequence that are computed together: later ones see all keys before them, and
# of their scores only those within the block can be hidden.
CAUSAL_BLOCK = 512


@dataclass(frozen=True)
class RowShape:
    """Tokens of a row: of its prompt, then of each completion. Padding comes after them."""

    prompt: int
    completions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tree:
    """The rows of one micro-batch, all padded to `length`."""

    rows: tuple[RowShape, ...]
    length: int

    def mask(self, device: torch.device) -> torch.Tensor:
        """[B, 1, L, L] bool, True = query attends to key. Padding attends to itself alone."""
        # Nobody may attend to nothing: a softmax over nothing would be nan.
        mask = torch.eye(self.length, dtype=torch.bool, device=device)
        mask_B1LL = mask.repeat(len(self.rows), 1, 1, 1)
        for b, row in enumerate(self.rows):
            start = row.prompt
            mask_B1LL[b, 0, :start, :start] = _causal(start, device)
            for n in row.completions:
                end = start + n
                mask_B1LL[b, 0, start:end, : row.prompt] = True
                mask_B1LL[b, 0, start:end, start:end] = _causal(n, device)
                start = end
        return mask_B1LL


def _causal(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T) v over a Tree. q [B, H, L, D]; k, v [B, K, L, D]; K divides H.

    Returns [B, L, H, D]; padding gives zeros.
    """
    q = q * scale
    rows = [_row(q[b], k[b], v[b], row, tree.length) for b, row in enumerate(tree.rows)]
    return torch.stack(rows)


def _row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: RowShape, length: int
) -> torch.Tensor:
    """One row: q [H, L, D], k and v [K, L, D] -> [L, H, D]."""
    heads, groups = q.shape[0], k.shape[0]
    # A prompt and one completion are a plain sequence.
    end = row.prompt + (row.completions[0] if len(row.completions) == 1 else 0)
    # Query heads that share a key head are stacked: no key is ever copied.
    q = q.unflatten(0, (groups, heads // groups))
    k1, v1 = k[:, :end], v[:, :end]
    parts = []
    for start in range(0, end, CAUSAL_BLOCK):
        stop = min(start + CAUSAL_BLOCK, end)
        scores = _grouped(q[:, :, start:stop], k1[:, :stop].transpose(1, 2))
        weights = (scores + _causal_bias(stop - start, stop, q)).softmax(-1)
        parts.append(_grouped(weights, v1[:, :stop]))
    if len(row.completions) > 1:
        tokens = sum(row.completions)
        part = slice(end, end + tokens)
        stack = _Stack(row.completions, q.device)
        q2, k2, v2 = (stack(x[..., part, :]) for x in (q, k, v))
        over_prompt = _grouped(q[:, :, part], k1.transpose(1, 2))
        bias = _causal_bias(stack.longest, stack.longest, q)
        over_own = _grouped(q2, k2.transpose(-1, -2)) + bias
        # One softmax over both: every completion token's scores side by side.
        scores = torch.cat([over_prompt, stack.undo(over_own)], -1)
        weights = scores.softmax(-1)
        own = stack.undo(_grouped(stack(weights[..., end:]), v2))
        parts.append(_grouped(weights[..., :end], v1) + own)
    out = torch.cat(parts, 2).flatten(0, 1).transpose(0, 1)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, length - out.shape[0]))


def _grouped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[..., K, R, n, m] @ [..., K, m, p] -> [..., K, R, n, p], as one product per key head."""
    return (a.flatten(-3, -2) @ b).unflatten(-2, a.shape[-3:-1])


def _causal_bias(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """[queries, keys], the last query at the last key: 0 where it may look, -inf where not."""
    hidden = torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device)
    return hidden.triu(1 + keys - queries)


class _Stack:
    """Lays the completions of a row on top of each other, padded to the longest.

    Padding comes last, where causal attention hides it from all that is not padding.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.shape = (len(lengths), max(lengths))
        self.longest = max(lengths)
        self.even = min(lengths) == self.longest
        if not self.even:
            each = torch.tensor(lengths, device=device)[:, None]
            offsets = torch.arange(self.longest, device=device)[None]
            used = offsets < each
            self.index = torch.where(used, each.cumsum(0) - each + offsets, 0).flatten()
            self.used = used.flatten().nonzero()[:, 0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[K, ..., C, D] -> [completions, K, ..., longest, D]"""
        if not self.even:
            x = x.index_select(-2, self.index)
        return x.unflatten(-2, self.shape).movedim(-3, 0)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """[completions, K, ..., longest, D] -> [K, ..., C, D]"""
        x = x.movedim(0, -3).flatten(-3, -2)
        return x if self.even else x.index_select(-2, self.used)


def tree_attention_forward(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    tree: Tree,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. The caller sees to it that no window or cap applies."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_attention(query, key, value, tree, scale), None


def register() -> None:
    """Make the attention known to transformers under the name TREE."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, tree_attention_forward)
