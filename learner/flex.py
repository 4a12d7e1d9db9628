"""Attention over trees of tokens on GPUs: torch's flex_attention, and no mask of L x L.

In the tree of all tokens of a micro-batch, the parent of a token is the one before it in its
sequence; a token attends to its ancestors and itself. Number the tokens as a walk down the tree
meets them: all that descend from a token then lie in one interval, `[enter, leave)`, and token q
attends to token k where `enter[k] <= enter[q] < leave[k]`. Two numbers a token say all there is to
say: rows are trees of their own, padding is a tree of one token.

Tokens are looked at in blocks. Of a pair of blocks, the smallest and largest numbers decide whether
it is left out, computed whole, or computed token by token (Dong et al. 2024, arXiv 2412.05496).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cohort.learner.attention import Tree
from cohort.learner.shapes import RowShape, Span

FLEX = "cohort_flex"
# Tokens of a block, of queries and of keys: what the kernels on GPUs are written for.
BLOCK = 128
# The tokens of a forward pass are padded to a multiple of this. Never a single block: torch
# compiles sizes of 1 by themselves.
FLEX_MULTIPLE = 2 * BLOCK
# One kernel for all lengths; None: the first length gets one of its own, False: every length.
DYNAMIC: bool | None = True


@dataclass(frozen=True)
class Intervals:
    """The tree of all tokens of a micro-batch, padding included; int32, on the CPU.

    Attributes:
        enter_N: When a walk down the tree meets the token.
        leave_N: When it has met all that descend from it.
        depth_N: The token's position in its sequence.
    """

    enter_N: torch.Tensor
    leave_N: torch.Tensor
    depth_N: torch.Tensor

    @classmethod
    def of(cls, tree: Tree, length: int) -> Intervals:
        """Of a tree whose rows lie one after another, padded to `length` tokens.

        Example:
            >>> Intervals.of(Tree((RowShape(2, (1, 2)),)), 5).leave_N.tolist()
            [5, 5, 3, 5, 5]
        """
        runs: list[tuple[int, int, int, int]] = []
        start = 0
        for row in tree.rows:
            runs += [(start + e, start + leave, d, n) for e, leave, d, n in _runs(row)]
            start += row.length
        runs += [(token, token + 1, 0, 1) for token in range(start, length)]
        enter, leave, depth, count = torch.tensor(runs, dtype=torch.int32).T
        before = count.cumsum(0) - count
        inside = torch.arange(length) - before.repeat_interleave(count)
        return cls(
            (enter.repeat_interleave(count) + inside).int(),
            leave.repeat_interleave(count),
            (depth.repeat_interleave(count) + inside).int(),
        )


def _runs(row: RowShape) -> list[tuple[int, int, int, int]]:
    """The row in parts without forks: (enter of the first token, leave of all, depth, tokens)."""
    parents: dict[int, int] = {}
    depths = {0: 0}
    start = row.prompt
    for tokens, kept, history in zip(row.branches, row.kept(), row.histories(), strict=True):
        # A branch begins behind the last token of what it continues; -1: behind nothing.
        parents[start], depths[start] = (history[-1][1] - 1 if history else -1), kept
        if tokens == 0:
            del parents[start], depths[start]
        start += tokens
    forks = {parent + 1 for parent in parents.values()}
    cuts = sorted({0, row.length, *parents, *forks})
    parts: list[Span] = list(pairwise(cuts))
    at_end = {stop - 1: index for index, (_, stop) in enumerate(parts)}
    above = [at_end[parent] if (parent := parents.get(a, a - 1)) >= 0 else -1 for a, _ in parts]
    # Parents come before children in a row.
    size = [stop - start for start, stop in parts]
    for index in reversed(range(len(parts))):
        if above[index] >= 0:
            size[above[index]] += size[index]
    runs = []
    free = {-1: 0}
    for index, (start, stop) in enumerate(parts):
        enter = free[above[index]]
        free[above[index]] += size[index]
        free[index] = enter + stop - start
        if start not in depths:
            previous, previous_stop = parts[index - 1]
            depths[start] = depths[previous] + previous_stop - previous
        runs.append((enter, enter + size[index], depths[start], stop - start))
    return runs


def block_mask(intervals: Intervals, device: torch.device, window: int | None = None) -> BlockMask:
    """Which tokens attend to which, without a tensor of more than (N / BLOCK)^2 numbers.

    Args:
        intervals: Of N tokens, a multiple of BLOCK.
        device: Of the queries.
        window: Tokens of a sequence that a token looks back on, itself included.
    """
    blocks = [x.view(-1, BLOCK) for x in (intervals.enter_N, intervals.leave_N, intervals.depth_N)]
    (enter0, leave0, depth0), (enter1, leave1, depth1) = zip(
        *(block.aminmax(dim=1) for block in blocks), strict=True
    )
    some = (enter0 <= enter1[:, None]) & (enter0[:, None] < leave1)
    full = (enter1 <= enter0[:, None]) & (enter1[:, None] < leave0)
    enter, leave, depth = (
        x.to(device) for x in (intervals.enter_N, intervals.leave_N, intervals.depth_N)
    )

    def visible(
        _batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (enter[k] <= enter[q]) & (enter[q] < leave[k])

    bound = window or 0

    def visible_in_window(
        batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return visible(batch, head, q, k) & (depth[q] - depth[k] < bound)

    mask_mod: Callable[..., torch.Tensor] = visible
    if window is not None:
        some &= depth0[:, None] - depth1 < window
        full &= depth1[:, None] - depth0 < window
        mask_mod = visible_in_window
    counts, indices = _listed(some & ~full)
    full_counts, full_indices = _listed(full)
    tokens = len(intervals.enter_N)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    ).to(device)


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[Q, K] bool -> how many blocks of keys each block of queries has, and those first; int32."""
    counts = chosen.sum(1, dtype=torch.int32)
    order = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], order[None, None].contiguous()


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # `fullgraph`: an error where it cannot be compiled (again); left to itself torch would compute
    # all L x L scores instead.
    return torch.compile(flex_attention, dynamic=DYNAMIC, fullgraph=True)


def flex_attention_forward(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    *,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for one row that holds all others under a block mask."""
    attend: Callable[..., torch.Tensor] = flex_attention
    if not query.is_cpu and not torch.compiler.is_compiling():  # else it is compiled with its layer
        attend = _compiled()
    out = attend(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention known to transformers under the name FLEX."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, flex_attention_forward)
