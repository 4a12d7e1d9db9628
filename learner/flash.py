"""Attention over trees of tokens on GPUs by torch's flash kernels, which take no mask.

A row is cut into sequences (the prompt, each branch; a branch that goes on where the sequence
before it ends belongs to that one). Every token attends causally to its own sequence, and to all
tokens that the sequence continues. Two calls of the kernel for many sequences compute these parts;
branches that lie together and continue the same tokens are one sequence of queries in the second.
Each call also returns the log-sum-exp of the scores, which says how much each part weighs:

    lse = log(exp(lse_1) + exp(lse_2)),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Given `out` and `lse` of the whole, the kernel's backward pass over a part is that part's share of
the gradients, exactly (Liu et al. 2023, arXiv 2310.01889; Dao 2023, arXiv 2307.08691). Key heads
are never copied for the query heads that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from cohort.learner.attention import Tree
from cohort.learner.shapes import RowShape, Span, padded_length

# transformers takes every name with "flash" in it for a package of kernels.
FLASH = "cohort_parts"
# The kernels are given the longest length rounded up to a multiple of this, their block size.
KERNEL_BLOCK = 128


@dataclass(frozen=True)
class Parts:
    """A micro-batch cut for the kernels; the same for all layers.

    Two tensors, so that compiled layers look at no number in it.

    Attributes:
        places: int32, on the device: where the sequences of the first call begin, and the end of
            the last; where those of the second begin, of queries and of keys; then which tokens
            the second call takes, its queries and its keys, where they do not lie in one piece.
        sizes: int64, on the CPU: how many numbers of `places` each of these is, the longest
            sequences (of the first call, of queries, of keys), and where the queries and keys of
            the second call begin and end if they lie in one piece.
    """

    places: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, tree: Tree, length: int, device: torch.device) -> Parts:
        """Of a tree whose rows lie one after another, padded to `length` tokens.

        Example:
            >>> Parts.of(Tree((RowShape(2, (1, 2)),)), 6, torch.device("cpu")).places.tolist()
            [0, 3, 5, 6, 0, 2, 0, 2]
        """
        own: list[Span] = []
        continued: list[tuple[Span, list[Span]]] = []
        start = 0
        for row in tree.rows:
            row_own, row_continued = cut(row)
            own += [_moved(span, start) for span in row_own]
            continued += [
                (_moved(queries, start), [_moved(span, start) for span in keys])
                for queries, keys in row_continued
            ]
            start += row.length
        if start < length:
            own.append((start, length))  # padding: nothing attends to it
        queries = [span for span, _ in continued]
        keys = [span for _, spans in continued for span in spans]
        lengths = [
            [stop - start for start, stop in own],
            [stop - start for start, stop in queries],
            [sum(stop - start for start, stop in spans) for _, spans in continued],
        ]
        places = [*map(_edges, lengths), _chosen(queries), _chosen(keys)]
        longest = [padded_length(max(each, default=0), KERNEL_BLOCK) for each in lengths]
        pieces = [*_one_piece(queries), *_one_piece(keys)]
        sizes = [*map(len, places), *longest, *pieces]
        return cls(torch.cat(places).int().to(device), torch.tensor(sizes))


def cut(row: RowShape) -> tuple[list[Span], list[tuple[Span, list[Span]]]]:
    """A row's sequences, and what is continued: (queries, where the tokens lie they continue)."""
    own: list[Span] = [(0, row.prompt)] if row.prompt else []
    continued: list[tuple[Span, list[Span]]] = []
    start = row.prompt
    for tokens, history in zip(row.branches, row.histories(), strict=True):
        if tokens == 0:
            continue
        stop, keys = start + tokens, _joined(history)
        if own and keys == [(own[-1][0], start)]:
            own[-1] = (own[-1][0], stop)
        else:
            own.append((start, stop))
            if keys and continued and continued[-1][0][1] == start and continued[-1][1] == keys:
                continued[-1] = ((continued[-1][0][0], stop), keys)
            elif keys:
                continued.append(((start, stop), keys))
        start = stop
    return own, continued


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that touch, as one."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _edges(lengths: Sequence[int]) -> torch.Tensor:
    """Where sequences that lie one after another begin, and the end of the last."""
    return torch.tensor([0, *accumulate(lengths)])


def _chosen(spans: Sequence[Span]) -> torch.Tensor:
    """The tokens, where they are not one piece; else none."""
    pieces = [torch.arange(*span) for span in spans] if len(spans) > 1 else []
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _one_piece(spans: Sequence[Span]) -> Span:
    return spans[0] if len(spans) == 1 else (0, 0)


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: where sequences of queries and keys begin, and the longest ones."""

    edges_q: torch.Tensor
    edges_k: torch.Tensor
    longest_q: int
    longest_k: int
    causal: bool


@dataclass(frozen=True)
class _Choice:
    """Tokens: a piece, or any."""

    piece: Span
    places: torch.Tensor

    def of(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tokens of x; a view where they are a piece."""
        if len(self.places):
            return x.index_select(dim, self.places)
        return x.narrow(dim, self.piece[0], self.piece[1] - self.piece[0])

    def put(self, x: torch.Tensor, part: torch.Tensor, dim: int = 0) -> None:
        """Write the tokens of x."""
        if len(self.places):
            x.index_copy_(dim, self.places.long(), part.to(x.dtype))
        else:
            self.of(x, dim).copy_(part)

    def add(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """x with a part added to the tokens, which may be chosen several times; changes x."""
        if len(self.places):
            # A token that many branches continue: its sum in 16 bits would lose small parts.
            return x.float().index_add_(0, self.places, part.float()).to(x.dtype)
        self.of(x).add_(part)
        return x


def _calls(
    places: torch.Tensor, sizes: torch.Tensor
) -> tuple[_Call, tuple[_Call, _Choice, _Choice] | None]:
    """What `Parts` says, taken apart; None: nothing is continued."""
    *counts, own, queries, keys, q0, q1, k0, k1 = sizes.tolist()
    edges, edges_q, edges_k, chosen_q, chosen_k = places.split(counts)
    first = _Call(edges, edges, own, own, causal=True)
    if queries == 0:
        return first, None
    second = _Call(edges_q, edges_k, queries, keys, causal=False)
    return first, (second, _Choice((q0, q1), chosen_q), _Choice((k0, k1), chosen_k))


@torch.library.custom_op("cohort::tree_flash", mutates_args=())
def tree_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v over a tree.

    Args:
        q: [N, H, D], contiguous; on GPUs 16 bits, D a multiple of 8 up to 256.
        k: [N, K, D]; K divides H.
        v: [N, K, D].
        places: Of `Parts`.
        sizes: Of `Parts`.
        scale: The factor on the scores.

    Returns:
        ([N, H, D], the log-sum-exp of the scores, [H, N] float32).
    """
    forward = _plain_forward if q.is_cpu else _kernel_forward
    first, rest = _calls(places, sizes)
    out, lse = forward(q, k, v, first, scale)
    if rest is not None:
        second, queries, keys = rest
        more, more_lse = forward(queries.of(q), keys.of(k), keys.of(v), second, scale)
        own, own_lse = queries.of(out), queries.of(lse, 1)
        both = torch.logaddexp(own_lse, more_lse)
        weights = ((part - both).exp().T[..., None] for part in (own_lse, more_lse))
        queries.put(out, next(weights) * own + next(weights) * more)
        queries.put(lse, both, 1)
    return out, lse


@torch.library.custom_op("cohort::tree_flash_backward", mutates_args=())
def tree_flash_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    places: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients by q, k and v.

    Args:
        gradient: By `out`, with its shape, and contiguous like it; the others as of `tree_flash`.
    """
    backward = _plain_backward if q.is_cpu else _kernel_backward
    first, rest = _calls(places, sizes)
    dq, dk, dv = backward(gradient, q, k, v, out, lse, first, scale)
    if rest is not None:
        second, queries, keys = rest
        more = backward(
            queries.of(gradient), queries.of(q), keys.of(k), keys.of(v), queries.of(out),
            queries.of(lse, 1).contiguous(), second, scale,
        )  # fmt: skip
        dq, dk, dv = queries.add(dq, more[0]), keys.add(dk, more[1]), keys.add(dv, more[2])
    return dq, dk, dv


@tree_flash.register_fake
def _(
    q: torch.Tensor, _k: Any, _v: Any, _places: Any, _sizes: Any, _scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@tree_flash_backward.register_fake
def _(
    _gradient: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, places, sizes, out, lse = ctx.saved_tensors
    found = tree_flash_backward(gradient.contiguous(), q, k, v, out, lse, places, sizes, ctx.scale)
    return *found, None, None, None


tree_flash.register_autograd(_backward, setup_context=_setup)


def _kernel_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, call.edges_q, call.edges_k, call.longest_q, call.longest_k, 0.0, call.causal,
        False, scale=scale,
    )  # fmt: skip
    return out, lse


def _kernel_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, call: _Call, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # The state of dropout, of which there is none.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        gradient, q, k, v, out, lse, call.edges_q, call.edges_k, call.longest_q, call.longest_k,
        0.0, call.causal, state, torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, a sequence at a time; on CPUs, to try it."""
    out, lse = torch.empty_like(q), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for rows, columns in _sequences(call):
        scores = _scores(q[rows], k[columns], call.causal, scale)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1)
        out[rows] = _by_token(scores.softmax(-1) @ _by_head(v[columns], v.shape[1])).to(q.dtype)
    return out, lse


def _plain_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, call: _Call, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """With p = exp(scores - lse): d scores = p (gradient v^T - gradient . out)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]
    for rows, columns in _sequences(call):
        scores = _scores(q[rows], k[columns], call.causal, scale)
        p = (scores - lse[:, rows].unflatten(0, (groups, -1))[..., None]).exp()
        g = _by_head(gradient[rows], groups)
        own = (gradient[rows].float() * out[rows].float()).sum(-1).T.unflatten(0, (groups, -1))
        ds = p * (g @ _by_head(v[columns], groups).mT - own[..., None]) * scale
        dq[rows] = _by_token(ds @ _by_head(k[columns], groups)).to(q.dtype)
        dk[columns] = (ds.mT @ _by_head(q[rows], groups)).sum(1).transpose(0, 1).to(k.dtype)
        dv[columns] = (p.mT @ g).sum(1).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


def _sequences(call: _Call) -> list[tuple[slice, slice]]:
    """The queries and the keys of every sequence."""
    pairs = (pairwise(edges.tolist()) for edges in (call.edges_q, call.edges_k))
    return [(slice(*rows), slice(*columns)) for rows, columns in zip(*pairs, strict=True)]


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """[K, H / K, queries, keys] float32."""
    scores = _by_head(q, k.shape[1]) @ _by_head(k, k.shape[1]).mT * scale
    if causal:
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _by_head(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[n, H, D] -> [groups, H / groups, n, D] float32."""
    return x.float().transpose(0, 1).unflatten(0, (groups, -1))


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[K, H / K, n, D] -> [n, H, D]"""
    return x.flatten(0, 1).transpose(0, 1)


def flash_attention_forward(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    parts: tuple[torch.Tensor, torch.Tensor],
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for a batch of one row that holds all others.

    The caller makes sure that no window or cap applies.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return tree_flash(q, k, v, *parts, scale)[0][None], None


def register() -> None:
    """Make the attention known to transformers under the name FLASH."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLASH, flash_attention_forward)
