"""Tasks: where prompts come from and which functions score them by default.

This is the module to import from: it loads tasks and offers the names of the parts below it, which
are `task` (the protocols), `rendering` (rows to prompts), `sampling` (their order) and `addition`.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path

from cohort.rewards.addition import AdditionTask
from cohort.rewards.base import RewardLoadError, error_tail, load_attribute, resolve_path
from cohort.rewards.config import TaskConfig
from cohort.rewards.rendering import PromptRenderer
from cohort.rewards.sampling import (
    SampledPrompts,
    row_order,
    sample_prompts,
    sample_rows,
    split_overlong,
)
from cohort.rewards.task import (
    Curriculum,
    Demonstrates,
    Fingerprinted,
    Measures,
    Row,
    Task,
    TaskError,
)

__all__ = [
    "AdditionTask",
    "Curriculum",
    "Demonstrates",
    "Fingerprinted",
    "Measures",
    "PromptRenderer",
    "Row",
    "SampledPrompts",
    "Task",
    "TaskError",
    "load_task",
    "row_order",
    "sample_prompts",
    "sample_rows",
    "split_overlong",
]

# By path, like a user's own tasks, so that a task's module is imported only when it is used.
BUILT_IN = {
    "addition": "cohort.rewards.addition:AdditionTask",
    "dataset": "cohort.rewards.dataset:DatasetTask",
    "reasoning_gym": "cohort.rewards.reasoning_gym:ReasoningGymTask",
    "mixture": "cohort.rewards.mixture:MixtureTask",
    "travel": "cohort.rewards.travel.task:TravelTask",
    "travel_agency": "cohort.rewards.travel.agency:AgencyTask",
}


def load_task(config: TaskConfig, seed: int) -> Task:
    """The task that the config names: a built-in one, module:Class or path.py:Class.

    A class of one's own is called as `Class(seed=seed, **task.options)`.

    Args:
        config: The section `task`.
        seed: The run's.

    Raises:
        TaskError: An unknown name or option, a missing data file, a bad row (with file and line), a
            class that raises or is not a Task, a split without rows.
    """
    if config.name == "dataset":
        if not config.data:
            raise TaskError("task.data: required by task.name=dataset")
        given: dict[str, object] = {"data": config.data, "eval_data": config.eval_data}
    elif config.data or config.eval_data:
        raise TaskError(f"task.data is only read by task.name=dataset, not by {config.name}")
    else:
        given = {"seed": seed}
    task = _construct(_task_class(config.name), config, given)
    if not isinstance(task, Task):
        wanted = ("rewards", "train_size", "train_row", "eval_size", "eval_row")
        missing = ", ".join(name for name in wanted if not hasattr(task, name))
        raise TaskError(f"task.name={config.name}: {type(task).__name__} has no {missing}")
    for split, size in (("training", task.train_size()), ("held-out", task.eval_size())):
        if size < 1:
            raise TaskError(f"task.name={config.name}: no {split} rows")
    return task


def _task_class(name: str) -> type:
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TaskError(
            f"task.name={name}: unknown task{hint} "
            f"(built in: {', '.join(BUILT_IN)}; your own: module:Class or path.py:Class)"
        )
    try:
        found = load_attribute(resolve_path(path, Path.cwd()))
    except RewardLoadError as error:
        raise TaskError(f"task.name={name}: {error}") from error
    if not inspect.isclass(found):
        raise TaskError(f"task.name={name} is not a class")
    return found


def _construct(cls: type, config: TaskConfig, given: dict[str, object]) -> object:
    parameters = inspect.signature(cls).parameters
    options = [name for name in parameters if name not in given]
    if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        for name in config.options:
            if name not in options:
                raise TaskError(
                    f"task.options.{name}: unknown option of task {config.name}; "
                    f"it has {', '.join(options) or 'none'}"
                )
    for name in options:
        item = parameters[name]
        required = item.default is item.empty and item.kind not in (
            item.VAR_KEYWORD,
            item.VAR_POSITIONAL,
        )
        if required and name not in config.options:
            raise TaskError(f"task.options.{name}: required by task {config.name}")
    try:
        return cls(**given, **config.options)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"task.name={config.name}: {cls.__name__} failed:\n{error_tail(error)}"
        ) from error
