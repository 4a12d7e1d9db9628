"""What environments gave for the episodes of a group, beside the scores of reward functions."""

from __future__ import annotations

from cohort.actors.records import Group, RewardError
from cohort.actors.turns import ENVIRONMENT


def environment_scores(group: Group) -> tuple[tuple[float | None, ...], tuple[RewardError, ...]]:
    """Each episode's reward, and an error for each that failed. Both empty without environment."""
    if all(completion.end is None for completion in group.completions):
        return (), ()
    rewards: list[float | None] = []
    errors: list[RewardError] = []
    for completion in group.completions:
        end = completion.end
        rewards.append(None if end is None or end.failure is not None else end.reward)
        if end is not None and end.failure is not None:
            failure = end.failure
            message = f"{failure.stage}: {failure.message}"
            died = failure.kind == "infra"
            errors.append(
                RewardError(ENVIRONMENT, completion.id, "died" if died else "raised", message)
            )
    return tuple(rewards), tuple(errors)


def turn_rewards(group: Group) -> tuple[tuple[float, ...], ...]:
    """For each episode what its environment gave for each of its turns, 0 where it gave nothing;
    empty without environment."""
    if all(completion.end is None for completion in group.completions):
        return ()
    return tuple(
        tuple(turn.reward or 0.0 for turn in completion.turns) for completion in group.completions
    )
