"""The plan of a step: what every rank does, decided in one place.

`plan_step` runs once, in the driver, on sizes and rewards alone. It decides everything that the
ranks must agree on: which completions are trained, with which advantage and weight (`credit`),
where they lie, and how many forward passes each rank makes (`packing`). Ranks only carry it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.learner.config import AlgorithmConfig
from cohort.learner.credit import TrainedGroup, assign_credit, token_weights
from cohort.learner.packing import PackedRow, Packer, Segment, Shards


@dataclass(frozen=True)
class StepPlan:
    """One step: one or several optimizer updates on the completions of its groups.

    trained + filtered + failed = all completions that came in, see `StepCredit`.

    Attributes:
        updates: The micro-batches of all ranks for each update.
        trained: Completions that are trained.
        trained_tokens: Completion tokens, over all updates, as the next two.
        row_tokens: With the prompts.
        padded_tokens: With the padding.
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


def plan_step(
    groups: Sequence[tuple[GroupMeta, ScoreMeta]],
    algorithm: AlgorithmConfig,
    packer: Packer,
    *,
    max_tokens: int,
    kl: Mapping[str, float] | None = None,
) -> StepPlan:
    """Plan one step. Pure: the same input gives the same plan.

    Args:
        groups: Sizes and rewards of all groups of the step.
        algorithm: How they are trained.
        packer: Ranks, budgets and the model's costs.
        max_tokens: The longest completion that the run allows.
        kl: Of every completion with tokens, by id, when `algorithm.kl_in` is reward; see
            `cohort.learner.objectives.kl_in_reward`.

    Raises:
        ValueError: A group's sizes and scores do not belong together.
    """
    credit = assign_credit(groups, algorithm, max_tokens, kl)
    # Groups are divided over this many updates, all of which are made this many times.
    count, repeats = 1, algorithm.updates_per_step
    if algorithm.update_on == "share":
        count, repeats = repeats, 1
    # Groups that are not trained are dealt out after the others: an update stands for all
    # completions of its part. An update without a group to train is not made.
    sizes = [group.usable for group in credit.groups] + list(credit.filtered_sizes)
    rows = [
        _rows(
            credit.groups[start::count],
            sum(sizes[start::count]),
            algorithm,
            max_tokens,
            packer,
        )
        for start in range(min(count, len(credit.groups)))
    ]
    updates = [packer.shards(of_update) for of_update in rows] * repeats
    return StepPlan(
        updates=tuple(updates),
        trained=credit.trained,
        filtered=credit.filtered,
        failed=credit.failed,
        groups_trained=len(credit.groups),
        groups_filtered=len(credit.filtered_sizes),
        groups_failed=credit.groups_failed,
        trained_tokens=repeats * sum(sum(group.lengths) for group in credit.groups),
        row_tokens=repeats * sum(row.length for of_update in rows for row in of_update),
        padded_tokens=sum(
            batch.padded_tokens for shards in updates for shard in shards for batch in shard
        ),
    )


def _rows(
    groups: Sequence[TrainedGroup],
    sampled: int,
    algorithm: AlgorithmConfig,
    max_tokens: int,
    packer: Packer,
) -> list[PackedRow]:
    """The rows of one update, every completion with its weight in the update's loss."""
    lengths = [group.lengths for group in groups]
    weights = token_weights(lengths, algorithm.aggregation, max_tokens, sampled)
    rows: list[PackedRow] = []
    for group, group_weights in zip(groups, weights, strict=True):
        meta = group.meta
        segments = [
            Segment(
                meta.completion_ids[i],
                meta.completion_tokens[i],
                group.mean_advantage(i),
                weight,
                meta.turns[i] if meta.turns else (),
                values if len(values) > 1 else (),
            )
            for (i, values), weight in zip(group.advantages.items(), group_weights, strict=True)
        ]
        rows += packer.rows(meta, segments)
    return rows


def score_batches(groups: Sequence[GroupMeta], packer: Packer) -> Shards:
    """Forward passes over every completion that has tokens, for scoring alone."""
    rows: list[PackedRow] = []
    for meta in groups:
        segments = [
            Segment(completion_id, tokens, 0.0, 1.0, meta.turns[i] if meta.turns else ())
            for i, (completion_id, tokens) in enumerate(
                zip(meta.completion_ids, meta.completion_tokens, strict=True)
            )
            if tokens
        ]
        rows += packer.rows(meta, segments)
    return packer.shards(rows)
