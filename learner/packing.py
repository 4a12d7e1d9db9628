"""Completions -> rows -> micro-batches, for all ranks, on sizes alone.

A row is the prompt of a group followed by several of its completions. Each completion attends to
the prompt and to itself, and its positions continue those of the prompt, so the prompt is computed
once for all of them and every completion sees exactly what it would see alone:

    row        p0 p1 p2 | a0 a1 a2 | b0 b1
    position    0  1  2 |  3  4  5 |  3  4

An episode whose history was rewritten is several branches that share what they have in common, see
`cohort.learner.episodes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from cohort.actors.records import GroupMeta
from cohort.actors.turns import TurnShape
from cohort.learner.episodes import Layout, Place, lay_out
from cohort.learner.shapes import LENGTH_MULTIPLE, Join, RowShape, padded_length


@dataclass(frozen=True)
class Segment:
    """One completion in a row.

    Attributes:
        tokens: Sampled tokens of it that this row trains: all but where `branch` is set.
        advantage: Of its tokens, on average.
        weight: Of each of its tokens in the loss of its update.
        turns: Of an episode.
        turn_advantages: Of the tokens of each turn; empty: `advantage` for all.
        branch: The one branch of the episode that this row trains, behind a copy of what that
            continues: for models that cannot share it.
    """

    completion_id: str
    tokens: int
    advantage: float
    weight: float
    turns: tuple[TurnShape, ...] = ()
    turn_advantages: tuple[float, ...] = ()
    branch: int | None = None

    def layout(self, prompt: int) -> Layout:
        """Its branches, behind a prompt of so many tokens."""
        if not self.turns:
            return Layout((self.tokens,), (Join(None, prompt),), (Place(0, 0, 0),))
        layout = lay_out(self.turns, prompt)
        return layout if self.branch is None else layout.only(self.branch)

    def length(self, prompt: int) -> int:
        """Tokens that it adds to a prompt of so many tokens."""
        return sum(self.layout(prompt).branches) if self.turns else self.tokens


@dataclass(frozen=True)
class PackedRow:
    """A prompt followed by some completions of its group.

    Attributes:
        prompt_tokens: Of the group's prompt; a row of one branch has as many of them as that branch
            continues.
    """

    group_id: str
    prompt_tokens: int
    segments: tuple[Segment, ...]

    @property
    def completion_tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def length(self) -> int:
        return self.shape.length

    @cached_property
    def shape(self) -> RowShape:
        return _shape(self.prompt_tokens, self.segments)


def _shape(prompt: int, segments: Sequence[Segment]) -> RowShape:
    """Of a row with these segments."""
    if not any(segment.turns for segment in segments):
        return RowShape(prompt, tuple(segment.tokens for segment in segments))
    layouts = [segment.layout(prompt) for segment in segments]
    if segments[0].branch is not None:
        [layout] = layouts
        return RowShape(layout.joins[0].kept, layout.branches)
    joins: list[Join] = []
    for layout in layouts:
        first = len(joins)
        joins += [
            Join(None if parent is None else first + parent, kept) for parent, kept in layout.joins
        ]
    plain = all(join == (None, prompt) for join in joins)
    return RowShape(
        prompt,
        tuple(tokens for layout in layouts for tokens in layout.branches),
        () if plain else tuple(joins),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward pass; empty on a rank that only joins the collectives.

    Attributes:
        chunks: In how many parts the output layer runs. The same on all ranks: under ZeRO-3 each
            part gathers the layer's weights, a collective operation.
        padded_tokens: Tokens that the model computes, including padding.
    """

    rows: tuple[PackedRow, ...]
    chunks: int
    padded_tokens: int = 0

    @property
    def segments(self) -> list[Segment]:
        """The segments of all rows, in the order of their tokens."""
        return [segment for row in self.rows for segment in row.segments]


# Of one update: for each rank its micro-batches, equally many.
Shards = tuple[tuple[MicroBatch, ...], ...]


@dataclass(frozen=True)
class RowCost:
    """Estimated work of a row, in units of one token's matrix products: tokens + q * pairs.

    Attributes:
        quadratic: q, the work of one token's attention to one other token, over all layers. The
            default fits small models; a running learner derives its own from the model's shape.
        masked: Rows are padded to the longest of their micro-batch, and all pairs of a row are
            computed, not only those that attend to each other; otherwise rows lie one after
            another.
        multiple: What the tokens of a micro-batch, or of a row when masked, are padded to.
    """

    quadratic: float = 1e-3
    masked: bool = True
    multiple: int = LENGTH_MULTIPLE

    def __call__(self, row: RowShape) -> float:
        length = row.length
        pairs = float(length**2)
        if not self.masked:
            tokens = length - row.prompt
            continued = row.prompt * tokens
            if row.joins:
                continued = sum(k * n for k, n in zip(row.kept(), row.branches, strict=True))
            pairs = (row.prompt**2 + sum(n**2 for n in row.branches)) / 2 + continued
        return length + self.quadratic * pairs

    def padded_tokens(self, rows: Sequence[PackedRow]) -> int:
        """Tokens that one forward pass over these rows computes."""
        if self.masked:
            longest = max((row.length for row in rows), default=0)
            return len(rows) * padded_length(longest, self.multiple)
        return padded_length(sum(row.length for row in rows), self.multiple)


@dataclass(frozen=True)
class Packer:
    """Lays completions out in rows, and rows in the micro-batches of all ranks.

    Attributes:
        ranks: Learner ranks.
        micro_batch_tokens: Budget of a forward pass, padding counted; a single row that exceeds it
            gets a forward pass of its own.
        logit_chunk_tokens: Completion tokens whose logits exist at one time.
        cost: Estimated work of a row.
        share_prompts: Whether the model can compute a prompt once for several completions, and
            what several turns of an episode continue.
        whole_completions: Whether all tokens of a completion must be in one forward pass, however
            long: ratios and masks of whole completions look at all of them.
    """

    ranks: int
    micro_batch_tokens: int
    logit_chunk_tokens: int = 1024
    cost: RowCost = RowCost()
    share_prompts: bool = True
    whole_completions: bool = True

    def rows(self, meta: GroupMeta, segments: Sequence[Segment]) -> list[PackedRow]:
        """Split a group into the number of rows with the least work, or into one per sequence.

        Fewer rows repeat the prompt less often; longer rows pay more attention to tokens that the
        mask then hides. Within a number of rows, the longest completions are dealt first, each to
        the shortest row. An episode is never split but where nothing can be shared.
        """
        prompt = meta.prompt_tokens
        size = {id(segment): segment.length(prompt) for segment in segments}
        longest_first = sorted(segments, key=lambda segment: -size[id(segment)])
        if not self.share_prompts:
            return [
                PackedRow(meta.group_id, prompt, (one,))
                for segment in longest_first
                for one in _sequences(segment, prompt)
            ]
        best: list[list[Segment]] = []
        best_work = float("inf")
        for count in range(1, len(segments) + 1):
            bins: list[list[Segment]] = [[] for _ in range(count)]
            lengths = [prompt] * count
            for segment in longest_first:
                shortest = lengths.index(min(lengths))
                bins[shortest].append(segment)
                lengths[shortest] += size[id(segment)]
            crowded = [n for n, b in zip(lengths, bins, strict=True) if len(b) > 1]
            if max(crowded, default=0) > self.micro_batch_tokens:
                continue
            work = sum(self.cost(_shape(prompt, b)) for b in bins)
            if work < best_work:
                best, best_work = bins, work
        return [PackedRow(meta.group_id, prompt, tuple(b)) for b in best]

    def shards(self, rows: Sequence[PackedRow]) -> Shards:
        """Deal the rows to the ranks by work, pack each rank's rows, and level the counts."""
        by_rank: list[list[PackedRow]] = [[] for _ in range(self.ranks)]
        work = [0.0] * self.ranks
        # All of a completion on one rank, which sums its KL.
        for some in sorted(_together(rows), key=lambda rows: -sum(row.length for row in rows)):
            least = work.index(min(work))
            by_rank[least] += some
            for row in some:
                work[least] += self.cost(row.shape)

        packed = [self._pack(rank_rows) for rank_rows in by_rank]
        count = max(len(batches) for batches in packed)
        for batches in packed:
            batches += [()] * (count - len(batches))
        # The output layer runs equally often on all ranks; the fullest decides how often.
        chunks = [max(1, *(self._chunks(batches[i]) for batches in packed)) for i in range(count)]
        return tuple(
            tuple(
                MicroBatch(rows, chunks[i], self.cost.padded_tokens(rows))
                for i, rows in enumerate(batches)
            )
            for batches in packed
        )

    def _pack(self, rows: Sequence[PackedRow]) -> list[tuple[PackedRow, ...]]:
        """Rows of similar length together, longest first, padding counted in the budget."""
        batches: list[list[PackedRow]] = []
        together = [[row] for row in rows]
        if self.whole_completions:
            together = _together(rows)
        for some in sorted(together, key=lambda rows: -max(row.length for row in rows)):
            tokens = self.cost.padded_tokens([*(batches[-1] if batches else ()), *some])
            if batches and tokens <= self.micro_batch_tokens:
                batches[-1] += some
            else:
                batches.append(some)
        return [tuple(batch) for batch in batches]

    def _chunks(self, rows: Sequence[PackedRow]) -> int:
        """In how many parts the output layer must run for these rows."""
        return -(-sum(row.completion_tokens for row in rows) // self.logit_chunk_tokens)


def _sequences(segment: Segment, prompt: int) -> list[Segment]:
    """A completion, one for each of its branches that has sampled tokens."""
    if not segment.turns:
        return [segment]
    layout = segment.layout(prompt)
    found = []
    for branch in range(len(layout.branches)):
        places = layout.only(branch).places
        if tokens := sum(segment.turns[place.turn].sampled for place in places):
            found.append(replace(segment, tokens=tokens, branch=branch))
    return found


def _together(rows: Sequence[PackedRow]) -> list[list[PackedRow]]:
    """Rows of the same completion, which follow one another, in one list; others by themselves."""

    def completion(row: PackedRow) -> str | int:
        return id(row) if row.segments[0].branch is None else row.segments[0].completion_id

    return [list(some) for _, some in groupby(rows, key=completion)]
