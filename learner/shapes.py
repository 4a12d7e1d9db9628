"""Lengths of rows, and what they are padded to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The tokens of a forward pass are padded to a multiple of this, so that the same shapes come back
# step after step. On CPUs a matrix product compiles a kernel for every new shape and keeps it: new
# shapes in every step cost a tenth of the time, and what is kept fragments the heap, which grows
# without bound.
LENGTH_MULTIPLE = 32

# From a row's token, to (not including) another.
Span = tuple[int, int]


def padded_length(length: int, multiple: int = LENGTH_MULTIPLE) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


class Join(NamedTuple):
    """Which tokens a branch continues.

    Attributes:
        parent: The earlier branch whose sequence it continues; None: the prompt.
        kept: Leading tokens of that sequence, the prompt counted, which it continues.
    """

    parent: int | None
    kept: int


@dataclass(frozen=True)
class RowShape:
    """Tokens of a row: of its prompt, then of each branch, and what each branch continues.

    Attributes:
        prompt: Tokens of the prompt.
        branches: Tokens of each branch. A completion is one branch, an episode whose history was
            rewritten is several.
        joins: Of each branch; empty where every branch continues the whole prompt.
    """

    prompt: int
    branches: tuple[int, ...] = ()
    joins: tuple[Join, ...] = ()

    @property
    def length(self) -> int:
        return self.prompt + sum(self.branches)

    def kept(self) -> list[int]:
        """How many tokens each branch continues."""
        return [join.kept for join in self.joins] or [self.prompt] * len(self.branches)

    def histories(self) -> list[list[Span]]:
        """Where in the row the tokens lie that each branch continues, in order of position."""
        found: list[list[Span]] = []
        sequences: list[list[Span]] = []
        start = self.prompt
        joins = self.joins or [Join(None, self.prompt)] * len(self.branches)
        for tokens, (parent, kept) in zip(self.branches, joins, strict=True):
            found.append(
                _leading([(0, self.prompt)] if parent is None else sequences[parent], kept)
            )
            sequences.append([*found[-1], (start, start + tokens)])
            start += tokens
        return found


def _leading(spans: Sequence[Span], tokens: int) -> list[Span]:
    """The part of these spans that holds their first tokens."""
    found = []
    for start, stop in spans:
        taken = min(tokens, stop - start)
        if taken:
            found.append((start, start + taken))
        tokens -= taken
    return found
