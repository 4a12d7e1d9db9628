"""Credit: which completions a step trains, with which advantages and token weights.

Works on rewards and lengths alone, without tensors, so that the driver and the report can use it:

    task rewards -> length penalty, KL -> advantages -> weights of the tokens in the loss

The loss of an optimizer update is a plain weighted sum over its tokens. The weights hold every
normaliser, so that no split into rows, micro-batches or ranks can change the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.actors.turns import ENVIRONMENT
from cohort.learner.advantages import (
    ByTurn,
    all_equal,
    group_advantages,
    overlong_penalty,
    standard_deviation,
    turn_advantages,
    valid,
    without_kl,
)
from cohort.learner.config import Aggregation, AlgorithmConfig


def token_weights(
    lengths: Sequence[Sequence[int]],
    aggregation: Aggregation,
    max_tokens: int,
    sampled: int | None = None,
) -> list[list[float]]:
    """The weight of each token of each completion in the loss of one optimizer update.

    token: 1 / all tokens (DAPO, arXiv 2503.14476, eq. 12). sequence: 1 / (completions * length)
    (GRPO, arXiv 2402.03300, eq. 3). prompt: 1 / (prompts * tokens of the prompt's completions).
    These three are means over what is trained. constant: 1 / (sampled * max_tokens), whatever else
    is trained (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: For every prompt, the sampled tokens of its completions, over all that the update
            trains.
        aggregation: `algorithm.aggregation`.
        max_tokens: The longest completion that the run allows.
        sampled: Usable completions that the update stands for, including those that are not
            trained because their group carries no signal or because they were truncated; None: as
            many as `lengths` has.

    Returns:
        For every prompt, the weight of each token of each of its completions.
    """
    completions = sum(len(group) for group in lengths)
    tokens = sum(sum(group) for group in lengths)
    prompts = len(lengths)
    weights: list[list[float]] = []
    for group in lengths:
        if aggregation == "token":
            weights.append([1.0 / tokens] * len(group))
        elif aggregation == "sequence":
            weights.append([1.0 / (completions * length) for length in group])
        elif aggregation == "prompt":
            weights.append([1.0 / (prompts * sum(group))] * len(group))
        else:
            counted = completions if sampled is None else sampled
            weights.append([1.0 / (counted * max_tokens)] * len(group))
    return weights


def task_rewards(meta: GroupMeta, scores: ScoreMeta) -> list[float | None]:
    """The weighted totals of the reward functions, before anything else shapes them.

    Returns:
        One reward for each completion. None without tokens: such a completion has no action to
        reinforce, whatever its reward.

    Raises:
        ValueError: Sizes and scores do not belong together.
    """
    _check_pair(meta, scores)
    return [
        None if tokens == 0 else reward
        for reward, tokens in zip(scores.totals, meta.completion_tokens, strict=True)
    ]


def _check_pair(meta: GroupMeta, scores: ScoreMeta) -> None:
    if meta.group_id != scores.group_id:
        raise ValueError(f"group {meta.group_id} was paired with the scores of {scores.group_id}")
    counts = (len(meta.completion_ids), len(meta.completion_tokens), len(scores.totals))
    if len(set(counts)) != 1:
        raise ValueError(f"group {meta.group_id}: {counts} ids, lengths and rewards differ")
    if meta.turns and len(meta.turns) != counts[0]:
        raise ValueError(f"group {meta.group_id}: turns of {len(meta.turns)} of {counts[0]} ids")
    rewarded = [len(turns) for turns in scores.turn_rewards]
    if rewarded and rewarded != [len(turns) for turns in meta.turns]:
        raise ValueError(
            f"group {meta.group_id}: {rewarded} turns have rewards, there are "
            f"{[len(turns) for turns in meta.turns]}"
        )
    if meta.prompt_tokens < 1:
        raise ValueError(f"group {meta.group_id}: an empty prompt predicts nothing")


def zero_variance(meta: GroupMeta, scores: ScoreMeta) -> bool:
    """Whether a group's task rewards are two or more, and all equal; see `all_equal`."""
    return all_equal(task_rewards(meta, scores))


def shaped_rewards(
    meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig, max_tokens: int
) -> list[float | None]:
    """The task rewards with the length penalty; a KL in the reward is not subtracted yet."""
    return [
        None
        if reward is None
        else reward + overlong_penalty(tokens, max_tokens, algorithm.overlong_buffer)
        for reward, tokens in zip(task_rewards(meta, scores), meta.completion_tokens, strict=True)
    ]


def turn_rewards(scores: ScoreMeta, rewards: Sequence[float | None]) -> ByTurn:
    """The rewards of each completion's turns, whose sum is its reward.

    A turn has what the environment gave for it. What else a completion has, from reward functions,
    the length penalty and the KL, counts to its last turn.

    Args:
        scores: Of the group. Without an environment every completion is one turn.
        rewards: Of each completion, in all.
    """
    if not scores.turn_rewards:
        return [None if reward is None else (reward,) for reward in rewards]
    from_environment = scores.by_function.get(ENVIRONMENT, (None,) * len(rewards))
    found: ByTurn = []
    for reward, turns, own in zip(rewards, scores.turn_rewards, from_environment, strict=True):
        if reward is None or not turns:
            found.append(None)
        else:
            rest = reward - (own if valid(own) else 0.0)
            found.append((*turns[:-1], turns[-1] + rest))
    return found


def _values(
    scores: ScoreMeta,
    rewards: Sequence[float | None],
    algorithm: AlgorithmConfig,
    batch_std: float,
    kl: Sequence[float] | None = None,
) -> ByTurn:
    """The advantages of a group: one for each completion, or those of its turns.

    See `group_advantages`, whose arguments these are, and `turn_advantages`.
    """
    if algorithm.credit == "episode":
        whole = group_advantages(rewards, algorithm, batch_std, kl)
        return [None if value is None else (value,) for value in whole]
    if kl is None:
        return turn_advantages(turn_rewards(scores, rewards), algorithm, batch_std)
    # As for completions: a scale of differences in KL alone would bring them to full size.
    alone = algorithm.scale == "group" and all_equal(_flat(turn_rewards(scores, rewards)))
    final = turn_rewards(scores, without_kl(rewards, kl, algorithm.kl_coef))
    return turn_advantages(final, algorithm, batch_std, scaled=not alone)


def _flat(rewards: ByTurn) -> list[float]:
    return [reward for turns in rewards if turns is not None for reward in turns]


def informative(meta: GroupMeta, scores: ScoreMeta, algorithm: AlgorithmConfig) -> bool:
    """Whether the policy gradient of the task rewards of a group can be anything but zero.

    Neither the length penalty nor the KL counts: without a difference in the task, the scale would
    bring the smallest difference in them to full size.
    """
    by_task = _values(scores, task_rewards(meta, scores), algorithm, 1.0)
    return any(
        values and any(values) and not _left_out(meta, i, algorithm)
        for i, values in enumerate(by_task)
    )


def _left_out(meta: GroupMeta, index: int, algorithm: AlgorithmConfig) -> bool:
    # A truncated completion stays in its group's statistics: it was truncated for being long.
    return algorithm.mask_truncated and meta.truncated[index]


@dataclass(frozen=True)
class TrainedGroup:
    """A group that a step trains.

    Attributes:
        advantages: Of each completion that is trained, by its index in the group: one, or with
            `algorithm.credit` = turn one for each of its turns.
        usable: Completions with an advantage, including those that `algorithm.mask_truncated`
            leaves out.
    """

    meta: GroupMeta
    advantages: dict[int, tuple[float, ...]]
    usable: int

    def mean_advantage(self, index: int) -> float:
        """Of a completion's tokens."""
        values = self.advantages[index]
        if len(values) == 1:
            return values[0]
        turns = zip(values, self.meta.turns[index], strict=True)
        total = sum(value * turn.sampled for value, turn in turns)
        return total / self.meta.completion_tokens[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion that is trained, in the order of `advantages`."""
        return [self.meta.completion_tokens[i] for i in self.advantages]


@dataclass(frozen=True)
class StepCredit:
    """Which completions of a step are trained; trained + filtered + failed = all that came in.

    Attributes:
        filtered_sizes: Usable completions of each group that is filtered as a whole.
        filtered: Completions whose group's task rewards are all equal, or that were truncated
            while `algorithm.mask_truncated` leaves these out.
        failed: Completions without reward or tokens, or alone in their group (unless they are
            demonstrations).
    """

    groups: tuple[TrainedGroup, ...]
    filtered_sizes: tuple[int, ...]
    filtered: int
    failed: int
    groups_failed: int

    @property
    def trained(self) -> int:
        """Completions that are trained."""
        return sum(len(group.advantages) for group in self.groups)

    @property
    def advantages(self) -> dict[str, float]:
        """The mean advantage of every completion's tokens, of those that are trained, by its id."""
        return {
            group.meta.completion_ids[i]: group.mean_advantage(i)
            for group in self.groups
            for i in group.advantages
        }


def assign_credit(
    groups: Sequence[tuple[GroupMeta, ScoreMeta]],
    algorithm: AlgorithmConfig,
    max_tokens: int,
    kl: Mapping[str, float] | None = None,
) -> StepCredit:
    """Choose the completions that a step trains, and compute their advantages.

    Args:
        groups: Sizes and rewards of all groups of the step.
        algorithm: Baseline, scale, filters and penalties.
        max_tokens: The longest completion that the run allows.
        kl: By completion id, the KL to subtract where `algorithm.kl_in` is reward, in nats; see
            `cohort.learner.objectives.kl_in_reward`.

    Raises:
        ValueError: A group's sizes and scores do not belong together.
    """
    kept: list[tuple[TrainedGroup, ScoreMeta, list[float | None], list[float] | None]] = []
    filtered_sizes: list[int] = []
    filtered = failed = groups_failed = 0
    for meta, scores in groups:
        rewards = shaped_rewards(meta, scores, algorithm, max_tokens)
        # A completion without tokens was not scored by the reference, and has no reward either.
        group_kl = None if kl is None else [kl.get(name, 0.0) for name in meta.completion_ids]
        values = _values(scores, rewards, algorithm, 1.0, group_kl)
        chosen = _chosen(meta, values, algorithm)
        usable = len(values) - values.count(None)
        failed += len(values) - usable
        if not usable:
            groups_failed += 1
        elif not chosen or (
            algorithm.drop_zero_variance and not informative(meta, scores, algorithm)
        ):
            filtered += usable
            filtered_sizes.append(usable)
        else:
            filtered += usable - len(chosen)
            kept.append((TrainedGroup(meta, chosen, usable), scores, rewards, group_kl))

    trained = [group for group, *_ in kept]
    if algorithm.scale == "batch" and kept:
        # The batch's standard deviation is that of the groups that are kept.
        final: list[float] = []
        for _, scores, rewards, group_kl in kept:
            if group_kl is not None:
                rewards = without_kl(rewards, group_kl, algorithm.kl_coef)
            if algorithm.credit == "turn":
                final += [r for r in _flat(turn_rewards(scores, rewards)) if valid(r)]
            else:
                final += [r for r in rewards if valid(r)]
        std = standard_deviation(final)
        trained = [
            replace(
                group,
                advantages=_chosen(
                    group.meta, _values(scores, rewards, algorithm, std, group_kl), algorithm
                ),
            )
            for group, scores, rewards, group_kl in kept
        ]
    return StepCredit(tuple(trained), tuple(filtered_sizes), filtered, failed, groups_failed)


def _chosen(
    meta: GroupMeta, values: ByTurn, algorithm: AlgorithmConfig
) -> dict[int, tuple[float, ...]]:
    """The advantages of the completions that are trained, by index."""
    return {
        i: value
        for i, value in enumerate(values)
        if value is not None and not _left_out(meta, i, algorithm)
    }
