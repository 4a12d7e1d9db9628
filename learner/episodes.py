"""Turns -> branches: how the tokens of an episode lie in a row, on sizes alone.

A turn that continues all of its parent's sequence follows it in the same branch. A turn whose
history was rewritten, and one that comes second to a parent, starts a branch of its own: it sees
the leading tokens that it kept, and they are neither stored nor computed again.

    turns     sampled a; inserted x, sampled b; then, from the middle of a, inserted y, sampled c
    branches  a0 a1 x0 b0 b1 | y0 c0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cohort.actors.turns import TurnShape
from cohort.learner.shapes import Join


@dataclass(frozen=True)
class Place:
    """Where the tokens of a turn lie: in which branch, after how many tokens of that branch.

    They are the turn's inserted tokens, then its sampled ones.

    Attributes:
        turn: Its index in the episode.
        branch: The branch's index.
        offset: Tokens of the branch before them.
    """

    turn: int
    branch: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The branches of one completion.

    Attributes:
        branches: Tokens of each.
        joins: Of each; their parents are branches of this completion.
        places: Of the turns that have these branches' tokens, in order.
    """

    branches: tuple[int, ...]
    joins: tuple[Join, ...]
    places: tuple[Place, ...]

    def only(self, branch: int) -> Layout:
        """One branch by itself, behind a copy of what it continues."""
        return Layout(
            (self.branches[branch],),
            (Join(None, self.joins[branch].kept),),
            tuple(Place(p.turn, 0, p.offset) for p in self.places if p.branch == branch),
        )


@lru_cache(maxsize=4096)
def lay_out(turns: tuple[TurnShape, ...], prompt: int) -> Layout:
    """The branches of an episode.

    Args:
        turns: Of the episode, in order.
        prompt: Tokens of its prompt.

    Raises:
        ValueError: A turn continues tokens that are not there, or samples after nothing.
    """
    branches: list[int] = []
    joins: list[Join] = []
    places: list[Place] = []
    for index, turn in enumerate(turns):
        _check(turns, index, prompt)
        parent = None if turn.parent is None else places[turn.parent]
        # The end of a branch is its last turn's: what continues all of it extends that turn.
        if parent is not None and turn.kept == joins[parent.branch].kept + branches[parent.branch]:
            places.append(Place(index, parent.branch, branches[parent.branch]))
        else:
            places.append(Place(index, len(branches), 0))
            joins.append(_join(parent, turn.kept, joins))
            branches.append(0)
        branches[places[-1].branch] += turn.inserted + turn.sampled
    return Layout(tuple(branches), tuple(joins), tuple(places))


def _join(parent: Place | None, kept: int, joins: Sequence[Join]) -> Join:
    """From the branch that has the last of the kept tokens."""
    branch = None if parent is None else parent.branch
    while branch is not None and kept <= joins[branch].kept:
        branch = joins[branch].parent
    return Join(branch, kept)


def _check(turns: Sequence[TurnShape], index: int, prompt: int) -> None:
    turn = turns[index]
    if turn.parent is not None and not 0 <= turn.parent < index:
        raise ValueError(f"turn {index} continues turn {turn.parent}, which is not before it")
    there = prompt if turn.parent is None else turns[turn.parent].end
    if not 0 <= turn.kept <= there:
        raise ValueError(f"turn {index} keeps {turn.kept} of {there} tokens")
    if min(turn.inserted, turn.sampled) < 0 or (turn.sampled and turn.kept + turn.inserted < 1):
        raise ValueError(f"turn {index} has no tokens to sample after: {turn}")
