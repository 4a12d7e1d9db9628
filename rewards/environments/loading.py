"""An environment's class by its path, and how an instance of it is played."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cohort.rewards.environments.base import Agent, EnvironmentLoadError, Message, Reply, Step
from cohort.rewards.environments.tools import (
    Played,
    Run,
    ToolEnv,
    accepted,
    has_served,
    has_step,
    tool_names,
)
from cohort.rewards.loading import RewardLoadError, load_attribute, resolve_path
from cohort.rewards.results import error_tail

# The short names of environments that come with Cohort, as `task.environment` takes them.
BUILT_IN = {
    "mcp": "cohort.rewards.environments.adapters.mcp:McpTools",
    "openenv": "cohort.rewards.environments.adapters.openenv:OpenEnv",
    "sandbox": "cohort.rewards.environments.sandbox_tools:SandboxTools",
    "skyrl_gym": "cohort.rewards.environments.adapters.skyrl_gym:SkyRLGym",
}


def environment_path(name: str, base: Path) -> str:
    """The path that `task.environment` means: of a short name, or of a file, made absolute.

    Args:
        name: A short name, module:Class or path.py:Class.
        base: The folder from which files are named.

    Raises:
        EnvironmentLoadError: It is a word, but not one of the short names.

    Example:
        >>> environment_path("sandbox", Path("."))
        'cohort.rewards.environments.sandbox_tools:SandboxTools'
    """
    if name in BUILT_IN or not name.isidentifier():
        return BUILT_IN.get(name) or resolve_path(name, base)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BUILT_IN)}."
    raise EnvironmentLoadError(
        f"task.environment={name} is not one of Cohort's environments: {hint} Your own is "
        "module:Class or path/to/file.py:Class"
    )


class StepEnv(Played):
    """Plays an instance that has `step`, whether or not its methods are `async`."""

    async def reset(self, row: Mapping[str, object], seed: int) -> list[Message] | str | None:
        reset = self.instance.reset
        found: list[Message] | str | None = await self._run(
            reset, **accepted(reset, {"row": dict(row), "seed": seed})
        )
        return found

    async def step(self, reply: Reply, _: float) -> Step:
        step: Step = await self._run(self.instance.step, reply)
        return step


class AgentEnv(Played):
    """Runs an instance that has a loop of its own."""

    @property
    def is_async(self) -> bool:
        """Whether it runs as a coroutine, which can be cancelled."""
        return inspect.iscoroutinefunction(self.instance.run)

    async def run(self, offered: Mapping[str, object]) -> object:
        """What the instance's `run` returns.

        Args:
            offered: Arguments that it may name.
        """
        run = self.instance.run
        return await self._run(run, **accepted(run, offered))


Playable: TypeAlias = StepEnv | ToolEnv


def is_agent(factory: object) -> bool:
    """Whether a class has a loop of its own."""
    return inspect.isclass(factory) and issubclass(factory, Agent)


def load_class(path: str, stubs: Path | None = None) -> Callable[..., object]:
    """The class, or function that makes environments, which `task.environment` names.

    Args:
        path: module:Class or path.py:Class, see `environment_path`.
        stubs: See `cohort.rewards.loading.load_function`.

    Raises:
        EnvironmentLoadError: It does not exist, or is not an environment.
    """
    try:
        factory = load_attribute(path, stubs)
    except RewardLoadError as error:
        raise EnvironmentLoadError(f"task.environment: {error}") from error
    if not callable(factory):
        raise EnvironmentLoadError(f"task.environment={path} is not a class or a function")
    if is_agent(factory):
        if factory.run is Agent.run:
            raise EnvironmentLoadError(f"task.environment={path} is an Agent without `run`")
        return factory
    able = has_step(factory) or has_served(factory) or tool_names(factory)
    if inspect.isclass(factory) and not able:
        raise EnvironmentLoadError(
            f"task.environment={path} has neither a method `step` nor a public method to be a tool"
        )
    _check_step(factory)
    return factory


def _check_step(factory: object) -> None:
    """Of a class, or an instance, that answers itself.

    Raises:
        EnvironmentLoadError: It has no `reset`.
    """
    if has_step(factory) and not callable(getattr(factory, "reset", None)):
        raise EnvironmentLoadError("task.environment has `step` and no `reset`: add one")


def make(factory: Callable[..., object], options: Mapping[str, object], run: Run) -> Playable:
    """A new environment for one episode.

    Raises:
        EnvironmentLoadError: The class cannot be constructed with `task.environment_options`.
    """
    instance = _instance(factory, options)
    if isinstance(instance, Agent):
        raise EnvironmentLoadError(
            "task.environment is a function that makes agents: name their class in its place"
        )
    _check_step(instance)
    alone = has_step(instance) and not getattr(instance, "tools", ())
    if not inspect.isclass(factory) and not alone:
        # Tools are read off what it names, before any instance is made.
        raise EnvironmentLoadError(
            "task.environment is a function that makes environments with tools, of which the model "
            f"would not be told: name their class, {type(instance).__name__}, in its place"
        )
    return StepEnv(instance, run) if has_step(instance) else ToolEnv(instance, run)


def make_agent(factory: Callable[..., object], options: Mapping[str, object], run: Run) -> AgentEnv:
    """A new agent for one episode; as `make`."""
    return AgentEnv(_instance(factory, options), run)


def _instance(factory: Callable[..., object], options: Mapping[str, object]) -> Any:
    try:
        return factory(**options)
    except Exception as error:
        raise EnvironmentLoadError(
            f"task.environment could not be constructed with task.environment_options: "
            f"{error_tail(error, 1000)}"
        ) from error
