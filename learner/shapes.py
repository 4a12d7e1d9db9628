"""Lengths of rows, and what they are padded to."""

from __future__ import annotations

from dataclasses import dataclass

# The tokens of a forward pass are padded to a multiple of this, so that the same shapes come back
# step after step. On CPUs a matrix product compiles a kernel for every new shape and keeps it: new
# shapes in every step cost a tenth of the time, and what is kept fragments the heap, which grows
# without bound.
LENGTH_MULTIPLE = 32


def padded_length(length: int) -> int:
    """The next multiple of LENGTH_MULTIPLE."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@dataclass(frozen=True)
class RowShape:
    """Tokens of a row: of its prompt, then of each completion."""

    prompt: int
    completions: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.prompt + sum(self.completions)
