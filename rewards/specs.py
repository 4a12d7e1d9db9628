"""From `rewards.functions` to what a reward worker loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from cohort.actors.turns import ENVIRONMENT
from cohort.rewards.config import RewardFunctionConfig, RewardsConfig
from cohort.rewards.loading import resolve_path, reward_path
from cohort.rewards.tasks import Task, TaskError

# Metrics of the totals; a function of such a name would overwrite them.
TOTAL_METRICS = frozenset({"mean", "std", "zero_variance_fraction", "error_rate", ENVIRONMENT})


@dataclass(frozen=True)
class RewardSpec:
    """A reward function of a run; attributes that are not listed are as in RewardFunctionConfig.

    Attributes:
        name: Unique, for metrics.
        path: Where to load it.
        weight: Its factor in the total.
    """

    name: str
    path: str
    weight: float = 1.0
    kind: str = "trl"
    options: dict[str, JsonValue] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    whole_group: bool | None = None


def reward_specs(
    task: Task, config: RewardsConfig, base: Path | None = None, environment: bool = False
) -> list[RewardSpec]:
    """The functions that score this run: the config's, else the task's own.

    Names are the last part of the paths, numbered where they repeat.

    Args:
        task: Of the run.
        config: The section `rewards`.
        base: Where relative files are looked for; by default the current folder.
        environment: The task has an environment, whose rewards may be all there are.

    Raises:
        TaskError: There is no function, or none with a weight other than 0.
    """
    chosen = task.rewards if config.functions is None else config.functions
    if not chosen and environment:
        return []
    if not chosen:
        raise TaskError(
            f"no reward function: set rewards.functions ({type(task).__name__} has none of its "
            "own, or not for all of its rows)"
            if config.functions is None
            else "rewards.functions is an empty list: name a function, or leave it out"
        )
    specs: list[RewardSpec] = []
    for item in chosen:
        entry = RewardFunctionConfig(path=item, weight=1.0) if isinstance(item, str) else item
        path = resolve_path(reward_path(entry.path), base or Path.cwd())
        stem = name = path.rpartition(":")[2]
        number = 1
        while name in TOTAL_METRICS | {spec.name for spec in specs}:
            number += 1
            name = f"{stem}_{number}"
        try:
            json.dumps(entry.options)
        except TypeError as error:
            raise TaskError(
                f"rewards.functions: the options of {entry.path} must be plain values: {error}"
            ) from error
        given = entry.model_dump(exclude={"path", "weight", "secrets", "sources"})
        secrets, sources = tuple(entry.secrets), tuple(entry.sources)
        specs.append(
            RewardSpec(name, path, entry.weight, secrets=secrets, sources=sources, **given)
        )
    if all(spec.weight == 0 for spec in specs):
        raise TaskError("every reward function has weight 0: there is nothing to learn from")
    return specs
