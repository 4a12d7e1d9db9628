"""Attention over rows in which several completions share one prompt, and turns what they continue.

A token of a branch attends to what the branch continues, and to what came before it in the branch.
As a mask over a row of L tokens that is L * L scores, most of them hidden when branches are many.
Here only the parts that are not hidden are computed: the prompt over itself, all completions over
the prompt, every completion over itself; the last two share a softmax. Where branches continue
other branches, each is computed by itself, over the keys of its own sequence. They are plain matrix
products: torch's fused attention for CPUs takes two to twenty times as long on such parts.

Rows lie one after another without padding: only attention needs to know where one ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from cohort.learner.shapes import RowShape, Span

TREE = "cohort_tree"
# Queries of a plain sequence that are computed together: later ones see all keys before them, and
# of their scores only those within the block can be hidden.
CAUSAL_BLOCK = 512
# Rows up to this length are computed together, padded, under a mask: their parts are too small.
MASKED_ROW_LENGTH = 256


@dataclass(frozen=True)
class Tree:
    """Which of the N tokens of a micro-batch attend to which; rows lie one after another."""

    rows: tuple[RowShape, ...]

    @property
    def longest(self) -> int:
        return max(row.length for row in self.rows)

    def places(self, length: int, device: torch.device) -> torch.Tensor:
        """[N] int64: where each token lies when rows are padded to `length`, flattened."""
        return torch.cat(
            [
                torch.arange(b * length, b * length + row.length, device=device)
                for b, row in enumerate(self.rows)
            ]
        )

    def mask(self, length: int, device: torch.device) -> torch.Tensor:
        """[B, 1, L, L] bool, True = query attends to key, of B rows padded to L = `length`.

        Padding attends to itself alone.
        """
        # A fully masked row would make the softmax nan: every token attends to itself.
        mask = torch.eye(length, dtype=torch.bool, device=device)
        mask_B1LL = mask.repeat(len(self.rows), 1, 1, 1)
        for b, row in enumerate(self.rows):
            start = row.prompt
            mask_B1LL[b, 0, :start, :start] = _causal(start, device)
            for n, history in zip(row.branches, row.histories(), strict=True):
                end = start + n
                for first, last in history:
                    mask_B1LL[b, 0, start:end, first:last] = True
                mask_B1LL[b, 0, start:end, start:end] = _causal(n, device)
                start = end
        return mask_B1LL


def _causal(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


class TreeAttention:
    """softmax(scale * q k^T) v over a Tree (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    What all layers have in common is made once, when it is created.

    Args:
        tree: Which tokens attend to which.
        like: A tensor with the device and dtype of the model's activations.
    """

    def __init__(self, tree: Tree, like: torch.Tensor) -> None:
        self._lengths = [row.length for row in tree.rows]
        self._short = [b for b, n in enumerate(self._lengths) if n <= MASKED_ROW_LENGTH]
        self._long = {
            b: _Branches(row, like) if row.joins else _Row(row, like)
            for b, row in enumerate(tree.rows)
            if b not in self._short
        }
        if self._short:
            short = Tree(tuple(tree.rows[b] for b in self._short))
            mask_B1LL = short.mask(short.longest, like.device)
            self._bias_B11LL = torch.zeros_like(mask_B1LL, dtype=like.dtype).masked_fill_(
                ~mask_B1LL, -math.inf
            )[:, None]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: [H, M, D], M >= N tokens, those behind N are padding.
            k: [K, M, D]; K divides H.
            v: [K, M, D].
            scale: The factor on the scores.

        Returns:
            [M, H, D], zeros behind N.
        """
        total = sum(self._lengths)
        heads, groups = q.shape[0], k.shape[0]
        # Query heads that share a key head are stacked: no key is ever copied.
        q = (q * scale).unflatten(0, (groups, heads // groups))
        rows = [x[..., :total, :].split(self._lengths, -2) for x in (q, k, v)]
        outputs = {b: row(*(x[b] for x in rows)) for b, row in self._long.items()}
        if self._short:
            padded = [_lay_side_by_side([x[b] for b in self._short]) for x in rows]
            scores = _grouped(padded[0], padded[1].transpose(-1, -2)) + self._bias_B11LL
            together = _grouped(scores.softmax(-1), padded[2])
            for b, output in zip(self._short, together, strict=True):
                outputs[b] = output[..., : self._lengths[b], :]
        out = torch.cat([outputs[b] for b in range(len(self._lengths))], -2)
        out = out.flatten(0, 1).transpose(0, 1)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, q.shape[-2] - total))


def _lay_side_by_side(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows [..., n, D] of several lengths -> [B, ..., longest, D], padded with zeros."""
    by_token = [row.movedim(-2, 0) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(by_token, batch_first=True).movedim(1, -2)


class _Row:
    """One row whose branches all continue the whole prompt, in parts."""

    def __init__(self, row: RowShape, like: torch.Tensor) -> None:
        # A prompt and one completion are a plain sequence.
        self.end = row.prompt + (row.branches[0] if len(row.branches) == 1 else 0)
        self.blocks = _blocks(self.end)
        self.biases = [_causal_bias(stop - start, stop, like) for start, stop in self.blocks]
        self.stack: _Stack | None = None
        if len(row.branches) > 1:
            self.stack = _Stack(row.branches, like)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [K, R, n, D], scaled; k and v [K, n, D] -> [K, R, n, D]."""
        # Split, not sliced: the gradient of a slice is a zeroed copy of the whole.
        sizes = [self.end, q.shape[-2] - self.end]
        (k1, k2), (v1, v2) = (x.split(sizes, 1) for x in (k, v))
        *blocks, q2 = q.split([stop - start for start, stop in self.blocks] + sizes[1:], 2)
        parts = []
        for block, (_, stop), bias in zip(blocks, self.blocks, self.biases, strict=True):
            scores = _grouped(block, k1[:, :stop].transpose(1, 2))
            parts.append(_grouped((scores + bias).softmax(-1), v1[:, :stop]))
        if self.stack is not None:
            stack = self.stack
            over_prompt = _grouped(q2, k1.transpose(1, 2))
            over_own = _grouped(stack(q2), stack(k2).transpose(-1, -2)) + stack.bias
            # One softmax over both: every completion token's scores side by side.
            scores = torch.cat([over_prompt, stack.undo(over_own)], -1)
            prompt, own = scores.softmax(-1).split([self.end, scores.shape[-1] - self.end], -1)
            mixed = stack.undo(_grouped(stack(own), stack(v2)))
            parts.append(_grouped(prompt, v1) + mixed)
        return torch.cat(parts, -2)


class _Branches:
    """One row of any tree: the prompt, then every branch over what it continues and itself."""

    def __init__(self, row: RowShape, like: torch.Tensor) -> None:
        self.lengths = [row.prompt, *row.branches]
        ends = list(accumulate(self.lengths))
        own = [(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]
        histories: list[list[Span]] = [[], *row.histories()]
        # Keys are split where any branch's history begins or ends, once for all branches.
        cuts = sorted({0, *ends, *(edge for spans in histories for span in spans for edge in span)})
        self.sizes = [stop - start for start, stop in pairwise(cuts)]
        piece = {cut: index for index, cut in enumerate(cuts)}
        self.pieces = [
            [i for start, stop in [*spans, span] for i in range(piece[start], piece[stop])]
            for spans, span in zip(histories, own, strict=True)
        ]
        kept = [0, *row.kept()]
        # Of every branch, (queries, keys) of its blocks.
        self.blocks = [
            [(stop - start, before + stop) for start, stop in _blocks(n)]
            for before, n in zip(kept, self.lengths, strict=True)
        ]
        self.biases = [[_causal_bias(*block, like) for block in blocks] for blocks in self.blocks]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [K, R, n, D], scaled; k and v [K, n, D] -> [K, R, n, D]."""
        keys, values = k.split(self.sizes, 1), v.split(self.sizes, 1)
        parts = []
        for query, pieces, blocks, biases in zip(
            q.split(self.lengths, 2), self.pieces, self.blocks, self.biases, strict=True
        ):
            if not blocks:
                continue
            key, value = (torch.cat([x[i] for i in pieces], 1) for x in (keys, values))
            queries = query.split([n for n, _ in blocks], 2)
            for block, (_, stop), bias in zip(queries, blocks, biases, strict=True):
                scores = _grouped(block, key[:, :stop].transpose(1, 2))
                parts.append(_grouped((scores + bias).softmax(-1), value[:, :stop]))
        return torch.cat(parts, -2)


def _blocks(length: int) -> list[Span]:
    """The parts of a plain sequence that are computed together."""
    return [(start, min(start + CAUSAL_BLOCK, length)) for start in range(0, length, CAUSAL_BLOCK)]


def _grouped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[..., K, R, n, m] @ [..., K, m, p] -> [..., K, R, n, p], as one product per key head."""
    return (a.flatten(-3, -2) @ b).unflatten(-2, a.shape[-3:-1])


def _causal_bias(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """[queries, keys], the last query at the last key: 0 where it attends, -inf where not."""
    hidden = torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device)
    return hidden.triu(1 + keys - queries)


class _Stack:
    """Lays the completions of a row on top of each other, padded to the longest.

    Padding comes last, where causal attention hides it from all that is not padding.
    """

    def __init__(self, lengths: tuple[int, ...], like: torch.Tensor) -> None:
        self.shape = (len(lengths), max(lengths))
        self.longest = max(lengths)
        self.bias = _causal_bias(self.longest, self.longest, like)
        self.even = min(lengths) == self.longest
        if not self.even:
            device = like.device
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
    tree: TreeAttention,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for a batch of one row that holds all others.

    The caller makes sure that no window or cap applies.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree(query[0], key[0], value[0], scale)[None], None


def register() -> None:
    """Make the attention known to transformers under the name TREE."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, tree_attention_forward)
