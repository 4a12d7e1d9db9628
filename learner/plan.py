"""Groups -> rows -> micro-batches: what every rank does in a step, decided in one place.

`plan_step` runs once, in the driver, on sizes and rewards alone. It decides everything that the
ranks must agree on: which completions are trained, with which advantage and weight, where they
lie, and how many forward passes each rank makes. Ranks only carry it out.

A row is the prompt of a group followed by several of its completions. Each completion attends to
the prompt and to itself, and its positions continue those of the prompt, so the prompt is computed
once for all of them and every completion sees exactly what it would see alone:

    row        p0 p1 p2 | a0 a1 a2 | b0 b1
    position    0  1  2 |  3  4  5 |  3  4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.learner.config import AlgorithmConfig
from cohort.learner.grpo import (
    all_equal,
    group_advantages,
    overlong_penalty,
    standard_deviation,
    token_weights,
    valid,
    without_kl,
)

# The tokens of a forward pass are padded to a multiple of this, so that the same shapes come back
# step after step. On CPUs a matrix product compiles a kernel for every new shape and keeps it: new
# shapes in every step cost a tenth of the time, and what is kept tears the heap into pieces that
# grow without end.
LENGTH_MULTIPLE = 32


@dataclass(frozen=True)
class Segment:
    """One completion in a row. weight: of each of its tokens in the loss of the whole step."""

    completion_id: str
    tokens: int
    advantage: float
    weight: float


@dataclass(frozen=True)
class PackedRow:
    """A prompt followed by some completions of its group."""

    group_id: str
    prompt_tokens: int
    pieces: tuple[Segment, ...]

    @property
    def completion_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def padded_length(length: int) -> int:
    """The next multiple of LENGTH_MULTIPLE."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward pass; none on a rank that only keeps the others company.

    chunks: in how many parts the output layer runs. The same on all ranks: under ZeRO-3 each part
    gathers the layer's weights, a collective operation.
    """

    rows: tuple[PackedRow, ...]
    chunks: int
    # What the model computes, with padding.
    padded_tokens: int = 0


# Of one update: for each rank its micro-batches, equally many.
Shards = tuple[tuple[MicroBatch, ...], ...]


@dataclass(frozen=True)
class StepPlan:
    """One step: one or several optimizer updates on the completions of its groups.

    trained + filtered + failed = all samples that came in. filtered: their group's task rewards are
    all equal, or they were cut and `algorithm.mask_truncated` leaves them out. failed: no reward,
    no tokens, or alone in its group (unless it is a demonstration). trained_tokens, row_tokens and
    padded_tokens count what all updates see.
    """

    updates: tuple[Shards, ...]
    trained: int
    filtered: int
    failed: int
    groups_trained: int
    groups_filtered: int
    groups_failed: int
    trained_tokens: int
    row_tokens: int
    padded_tokens: int

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of every rank, over all updates."""
        return sum(len(shards[0]) for shards in self.updates)


@dataclass(frozen=True)
class RowCost:
    """Estimated work of a row, in units of one token's matrix products: tokens + q * pairs.

    quadratic (q): work of one token's attention to one other token, over all layers. The default
    fits small models; a running learner derives its own from the model's shape. masked: rows are
    padded to the longest of their micro-batch, and all pairs of a row are computed, not only those
    that attend to each other; otherwise rows lie one after another.
    """

    quadratic: float = 1e-3
    masked: bool = True

    def __call__(self, prompt: int, completions: Sequence[int]) -> float:
        tokens = sum(completions)
        length = prompt + tokens
        pairs = float(length**2)
        if not self.masked:
            pairs = (prompt**2 + sum(n**2 for n in completions)) / 2 + prompt * tokens
        return length + self.quadratic * pairs

    def padded_tokens(self, rows: Sequence[PackedRow]) -> int:
        """Tokens that one forward pass over these rows computes."""
        if self.masked:
            return len(rows) * padded_length(max((row.length for row in rows), default=0))
        return padded_length(sum(row.length for row in rows))


@dataclass(frozen=True)
class _Chosen:
    """What a group contributes: the completions that are trained, with their advantages."""

    meta: GroupMeta
    completions: tuple[tuple[int, float], ...]

    @property
    def lengths(self) -> list[int]:
        return [self.meta.completion_tokens[i] for i, _ in self.completions]


def task_rewards(meta: GroupMeta, scores: ScoreMeta) -> list[float | None]:
    """The weighted totals of the reward functions, before anything else shapes them.

    None without tokens: such a completion has no action to reinforce, whatever its reward.

    Raises ValueError when sizes and scores do not belong together.
    """
    _check_pair(meta, scores)
    return [
        None if tokens == 0 else reward
        for reward, tokens in zip(scores.totals, meta.completion_tokens, strict=True)
    ]


def zero_variance(meta: GroupMeta, scores: ScoreMeta) -> bool:
    """Whether a group's task rewards are two or more, and all equal; see `all_equal`."""
    return all_equal(task_rewards(meta, scores))


def shaped_rewards(
    meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig, max_tokens: int
) -> list[float | None]:
    """The task rewards with the length penalty; a KL in the reward is still to be taken off."""
    return [
        None
        if reward is None
        else reward + overlong_penalty(tokens, max_tokens, algorithm.overlong_buffer)
        for reward, tokens in zip(task_rewards(meta, scores), meta.completion_tokens, strict=True)
    ]


@dataclass(frozen=True)
class _Judged:
    """A group before anything is known of the others.

    rewards: with the length penalty. kl: to be taken off them, of every completion; None: none is.
    signal: whether the policy gradient of the task rewards can be anything but zero. Neither the
    length penalty nor the KL makes a signal: without a difference in the task, the scale would
    bring the smallest difference in them to full size.
    """

    meta: GroupMeta
    rewards: list[float | None]
    kl: list[float] | None
    signal: bool

    def advantages(self, algorithm: AlgorithmConfig, std: float | None) -> list[float | None]:
        return group_advantages(self.rewards, algorithm, std, self.kl)

    def final(self, algorithm: AlgorithmConfig) -> list[float]:
        """The valid rewards that advantages are made of."""
        rewards = self.rewards
        if self.kl is not None:
            rewards = without_kl(rewards, self.kl, algorithm.kl_coef)
        return [reward for reward in rewards if valid(reward)]

    def choose(self, algorithm: AlgorithmConfig, std: float | None) -> _Chosen:
        values = self.advantages(algorithm, std)
        return _Chosen(
            self.meta,
            tuple(
                (i, value)
                for i, value in enumerate(values)
                if value is not None and not _left_out(self.meta, i, algorithm)
            ),
        )


def _left_out(meta: GroupMeta, index: int, algorithm: AlgorithmConfig) -> bool:
    # A cut completion stays in its group's statistics: it was cut for being long.
    return algorithm.mask_truncated and meta.truncated[index]


def _judge(
    meta: GroupMeta,
    scores: ScoreMeta,
    algorithm: AlgorithmConfig,
    max_tokens: int,
    kl: Mapping[str, float] | None = None,
) -> _Judged:
    by_task = group_advantages(task_rewards(meta, scores), algorithm, 1.0)
    return _Judged(
        meta,
        shaped_rewards(meta, scores, algorithm, max_tokens),
        # What has no tokens was not scored by the reference, and has no reward either.
        None if kl is None else [kl.get(name, 0.0) for name in meta.completion_ids],
        any(value and not _left_out(meta, i, algorithm) for i, value in enumerate(by_task)),
    )


def informative(
    meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig, max_tokens: int
) -> bool:
    """Whether the task rewards of this group tell its completions apart."""
    return _judge(meta, scores, algorithm, max_tokens).signal


def plan_step(
    groups: Sequence[tuple[GroupMeta, ScoreMeta]],
    algorithm: AlgorithmConfig,
    *,
    ranks: int,
    micro_batch_tokens: int,
    max_tokens: int,
    logit_chunk_tokens: int = 1024,
    cost: RowCost | None = None,
    share_prompts: bool = True,
    kl: Mapping[str, float] | None = None,
) -> StepPlan:
    """Plan one step. Pure: the same input gives the same plan.

    micro_batch_tokens: budget of a forward pass, padding counted; a single row that exceeds it gets
    a forward pass of its own. max_tokens: the longest completion the run allows. share_prompts:
    whether the model can compute a prompt once for several completions. kl: of every completion
    with tokens, by id, when `algorithm.kl_in` is reward; see `kl_in_reward`.

    Raises ValueError when a group's sizes and scores do not belong together.
    """
    row_cost = cost if cost is not None else RowCost()
    kept: list[_Judged] = []
    # Completions that could be trained, of the groups that are kept and of those that are not.
    kept_sizes: list[int] = []
    filtered_sizes: list[int] = []
    filtered = failed = groups_failed = 0
    for meta, scores in groups:
        judged = _judge(meta, scores, algorithm, max_tokens, kl)
        # The batch's standard deviation is that of the groups that are kept; it moves no zero.
        values = judged.advantages(algorithm, 1.0)
        usable = len(values) - values.count(None)
        failed += len(values) - usable
        chosen = judged.choose(algorithm, 1.0)
        if not usable:
            groups_failed += 1
        elif not chosen.completions or (algorithm.drop_zero_variance and not judged.signal):
            filtered += usable
            filtered_sizes.append(usable)
        else:
            filtered += usable - len(chosen.completions)
            kept.append(judged)
            kept_sizes.append(usable)

    std = None
    if algorithm.scale == "batch" and kept:
        std = standard_deviation([r for judged in kept for r in judged.final(algorithm)])
    trained = [judged.choose(algorithm, std) for judged in kept]
    # Groups are divided over this many updates, all of which are made this many times.
    count, repeats = 1, algorithm.updates_per_step
    if algorithm.update_on == "share":
        count, repeats = repeats, 1
    # Groups that are not trained are dealt out after the others: an update stands for all
    # completions of its share. An update without a group to train is not made.
    sizes = kept_sizes + filtered_sizes
    rows = [
        _rows(
            trained[start::count],
            sum(sizes[start::count]),
            algorithm,
            max_tokens,
            micro_batch_tokens,
            row_cost,
            share_prompts,
        )
        for start in range(min(count, len(trained)))
    ]
    updates = [
        _shards(of_share, ranks, micro_batch_tokens, logit_chunk_tokens, row_cost)
        for of_share in rows
    ] * repeats
    return StepPlan(
        updates=tuple(updates),
        trained=sum(len(chosen.completions) for chosen in trained),
        filtered=filtered,
        failed=failed,
        groups_trained=len(trained),
        groups_filtered=len(filtered_sizes),
        groups_failed=groups_failed,
        trained_tokens=repeats * sum(sum(chosen.lengths) for chosen in trained),
        row_tokens=repeats * sum(row.length for of_share in rows for row in of_share),
        padded_tokens=sum(
            batch.padded_tokens for shards in updates for shard in shards for batch in shard
        ),
    )


def _rows(
    share: Sequence[_Chosen],
    sampled: int,
    algorithm: AlgorithmConfig,
    max_tokens: int,
    budget: int,
    cost: RowCost,
    share_prompts: bool,
) -> list[PackedRow]:
    """The rows of one update, every completion with its weight in the update's loss."""
    weights = token_weights(
        [chosen.lengths for chosen in share], algorithm.aggregation, max_tokens, sampled
    )
    rows: list[PackedRow] = []
    for chosen, group_weights in zip(share, weights, strict=True):
        meta = chosen.meta
        pieces = [
            Segment(meta.completion_ids[i], meta.completion_tokens[i], value, weight)
            for (i, value), weight in zip(chosen.completions, group_weights, strict=True)
        ]
        rows += _rows_of_group(meta, pieces, budget, cost, share_prompts)
    return rows


def score_batches(
    groups: Sequence[GroupMeta],
    *,
    ranks: int,
    micro_batch_tokens: int,
    logit_chunk_tokens: int = 1024,
    cost: RowCost | None = None,
    share_prompts: bool = True,
) -> Shards:
    """Forward passes over every completion that has tokens, for scoring alone."""
    row_cost = cost if cost is not None else RowCost()
    rows: list[PackedRow] = []
    for meta in groups:
        pieces = [
            Segment(completion_id, tokens, 0.0, 1.0)
            for completion_id, tokens in zip(
                meta.completion_ids, meta.completion_tokens, strict=True
            )
            if tokens
        ]
        rows += _rows_of_group(meta, pieces, micro_batch_tokens, row_cost, share_prompts)
    return _shards(rows, ranks, micro_batch_tokens, logit_chunk_tokens, row_cost)


def _check_pair(meta: GroupMeta, scores: ScoreMeta) -> None:
    if meta.group_id != scores.group_id:
        raise ValueError(f"group {meta.group_id} was paired with the scores of {scores.group_id}")
    counts = (len(meta.completion_ids), len(meta.completion_tokens), len(scores.totals))
    if len(set(counts)) != 1:
        raise ValueError(f"group {meta.group_id}: {counts} ids, lengths and rewards differ")
    if meta.prompt_tokens < 1:
        raise ValueError(f"group {meta.group_id}: an empty prompt predicts nothing")


def _rows_of_group(
    meta: GroupMeta, pieces: list[Segment], budget: int, cost: RowCost, share_prompts: bool
) -> list[PackedRow]:
    """Split a group into the number of rows with the least work, or into one a completion.

    Fewer rows repeat the prompt less often; longer rows pay more attention to tokens that the mask
    then hides. Within a number of rows, the longest completions are dealt first, each to the
    shortest row.
    """
    best: list[list[Segment]] = []
    best_work = float("inf")
    for count in range(1 if share_prompts else len(pieces), len(pieces) + 1):
        bins: list[list[Segment]] = [[] for _ in range(count)]
        lengths = [meta.prompt_tokens] * count
        for piece in sorted(pieces, key=lambda piece: -piece.tokens):
            shortest = lengths.index(min(lengths))
            bins[shortest].append(piece)
            lengths[shortest] += piece.tokens
        fits = all(length <= budget or len(b) == 1 for length, b in zip(lengths, bins, strict=True))
        work = sum(cost(meta.prompt_tokens, [piece.tokens for piece in b]) for b in bins)
        if fits and work < best_work:
            best, best_work = bins, work
    return [PackedRow(meta.group_id, meta.prompt_tokens, tuple(pieces)) for pieces in best]


def _shards(
    rows: list[PackedRow], ranks: int, budget: int, chunk_tokens: int, cost: RowCost
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Deal the rows to the ranks by work, pack each rank's rows, level the counts."""
    by_rank: list[list[PackedRow]] = [[] for _ in range(ranks)]
    work = [0.0] * ranks
    for row in sorted(rows, key=lambda row: -row.length):
        least = work.index(min(work))
        by_rank[least].append(row)
        work[least] += cost(row.prompt_tokens, [piece.tokens for piece in row.pieces])

    packed = [_pack(rank_rows, budget, cost) for rank_rows in by_rank]
    count = max(len(batches) for batches in packed)
    for batches in packed:
        batches += [()] * (count - len(batches))
    # The output layer runs equally often on all ranks; the fullest decides how often.
    chunks = [
        max(
            1,
            *(
                -(-sum(row.completion_tokens for row in batches[i]) // chunk_tokens)
                for batches in packed
            ),
        )
        for i in range(count)
    ]
    return tuple(
        tuple(
            MicroBatch(batches[i], chunks[i], cost.padded_tokens(batches[i])) for i in range(count)
        )
        for batches in packed
    )


def _pack(rows: list[PackedRow], budget: int, cost: RowCost) -> list[tuple[PackedRow, ...]]:
    """Rows of similar length together, longest first, padding counted in the budget."""
    batches: list[list[PackedRow]] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batches and cost.padded_tokens([*batches[-1], row]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [tuple(batch) for batch in batches]
