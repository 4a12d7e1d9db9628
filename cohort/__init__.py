"""Cohort: GRPO for language models on Ray, vLLM and DeepSpeed.

    import cohort

    config = cohort.load_config("gsm8k.yaml", ["run.steps=100"])
    cohort.train(config)

`train` and `evaluate` do what the commands of these names do; `launch` starts the parts of a run
for a loop of your own; `Task`, `Prompt` and `Group` are what tasks and rewards are written with,
`Env`, `Reply`, `Step` and `Agent` what environments are.
Every error whose message is meant for people is a `CohortError`.

The packages below, in the order in which data passes through them: `cohort.rewards` (tasks, reward
functions), `cohort.actors` (engines that generate), `cohort.learner` (GRPO), `cohort.cluster` (the
loop, the commands, what is recorded).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cohort.actors.errors import CohortError
    from cohort.actors.records import Group, Prompt
    from cohort.cluster.config import Config
    from cohort.cluster.config_file import load_config
    from cohort.cluster.session import evaluate, launch, train
    from cohort.rewards.environments.base import Agent, Env, Reply, Step
    from cohort.rewards.tasks import Task

__all__ = [
    "Agent",
    "CohortError",
    "Config",
    "Env",
    "Group",
    "Prompt",
    "Reply",
    "Step",
    "Task",
    "evaluate",
    "launch",
    "load_config",
    "train",
]

_HOMES = {
    "Agent": "rewards.environments.base",
    "CohortError": "actors.errors",
    "Config": "cluster.config",
    "Env": "rewards.environments.base",
    "Group": "actors.records",
    "Prompt": "actors.records",
    "Reply": "rewards.environments.base",
    "Step": "rewards.environments.base",
    "Task": "rewards.tasks",
    "evaluate": "cluster.session",
    "launch": "cluster.session",
    "load_config": "cluster.config_file",
    "train": "cluster.session",
}


def __getattr__(name: str) -> object:
    # On first use: every child process imports this package, and most need little of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'cohort' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cohort.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
