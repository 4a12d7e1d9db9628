"""Completions -> rows -> micro-batches, for all ranks, on sizes alone.

A row is the prompt of a group followed by several of its completions. Each completion attends to
the prompt and to itself, and its positions continue those of the prompt, so the prompt is computed
once for all of them and every completion sees exactly what it would see alone:

    row        p0 p1 p2 | a0 a1 a2 | b0 b1
    position    0  1  2 |  3  4  5 |  3  4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cohort.actors.records import GroupMeta
from cohort.learner.shapes import RowShape, padded_length


@dataclass(frozen=True)
class Segment:
    """One completion in a row. weight: of each of its tokens in the loss of its update."""

    completion_id: str
    tokens: int
    advantage: float
    weight: float


@dataclass(frozen=True)
class PackedRow:
    """A prompt followed by some completions of its group."""

    group_id: str
    prompt_tokens: int
    segments: tuple[Segment, ...]

    @property
    def completion_tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def shape(self) -> RowShape:
        return RowShape(self.prompt_tokens, tuple(segment.tokens for segment in self.segments))


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
        """The completions of all rows, in the order of their tokens."""
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
    """

    quadratic: float = 1e-3
    masked: bool = True

    def __call__(self, row: RowShape) -> float:
        length = row.length
        pairs = float(length**2)
        if not self.masked:
            tokens = length - row.prompt
            pairs = (row.prompt**2 + sum(n**2 for n in row.completions)) / 2 + row.prompt * tokens
        return length + self.quadratic * pairs

    def padded_tokens(self, rows: Sequence[PackedRow]) -> int:
        """Tokens that one forward pass over these rows computes."""
        if self.masked:
            return len(rows) * padded_length(max((row.length for row in rows), default=0))
        return padded_length(sum(row.length for row in rows))


@dataclass(frozen=True)
class Packer:
    """Lays completions out in rows, and rows in the micro-batches of all ranks.

    Attributes:
        ranks: Learner ranks.
        micro_batch_tokens: Budget of a forward pass, padding counted; a single row that exceeds it
            gets a forward pass of its own.
        logit_chunk_tokens: Completion tokens whose logits exist at one time.
        cost: Estimated work of a row.
        share_prompts: Whether the model can compute a prompt once for several completions.
    """

    ranks: int
    micro_batch_tokens: int
    logit_chunk_tokens: int = 1024
    cost: RowCost = RowCost()
    share_prompts: bool = True

    def rows(self, meta: GroupMeta, segments: Sequence[Segment]) -> list[PackedRow]:
        """Split a group into the number of rows with the least work, or into one per completion.

        Fewer rows repeat the prompt less often; longer rows pay more attention to tokens that the
        mask then hides. Within a number of rows, the longest completions are dealt first, each to
        the shortest row.
        """
        longest_first = sorted(segments, key=lambda segment: -segment.tokens)
        best: list[list[Segment]] = []
        best_work = float("inf")
        for count in range(1 if self.share_prompts else len(segments), len(segments) + 1):
            bins: list[list[Segment]] = [[] for _ in range(count)]
            lengths = [meta.prompt_tokens] * count
            for segment in longest_first:
                shortest = lengths.index(min(lengths))
                bins[shortest].append(segment)
                lengths[shortest] += segment.tokens
            crowded = [n for n, b in zip(lengths, bins, strict=True) if len(b) > 1]
            if max(crowded, default=0) > self.micro_batch_tokens:
                continue
            work = sum(
                self.cost(RowShape(meta.prompt_tokens, tuple(segment.tokens for segment in b)))
                for b in bins
            )
            if work < best_work:
                best, best_work = bins, work
        return [PackedRow(meta.group_id, meta.prompt_tokens, tuple(b)) for b in best]

    def shards(self, rows: Sequence[PackedRow]) -> Shards:
        """Deal the rows to the ranks by work, pack each rank's rows, and level the counts."""
        by_rank: list[list[PackedRow]] = [[] for _ in range(self.ranks)]
        work = [0.0] * self.ranks
        for row in sorted(rows, key=lambda row: -row.length):
            least = work.index(min(work))
            by_rank[least].append(row)
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
        for row in sorted(rows, key=lambda row: -row.length):
            if batches and self.cost.padded_tokens([*batches[-1], row]) <= self.micro_batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        return [tuple(batch) for batch in batches]

    def _chunks(self, rows: Sequence[PackedRow]) -> int:
        """In how many parts the output layer must run for these rows."""
        return -(-sum(row.completion_tokens for row in rows) // self.logit_chunk_tokens)
