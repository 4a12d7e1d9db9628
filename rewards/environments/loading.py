"""An environment's class by its path, and how an instance of it is played."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cohort.rewards.environments.base import Agent, EnvironmentLoadError, Message, Reply, Step
from cohort.rewards.environments.tools import Played, Run, ToolEnv, accepted, has_step, tool_names
from cohort.rewards.loading import RewardLoadError, load_attribute
from cohort.rewards.results import error_tail


class StepEnv(Played):
    """Plays an instance that has `step`, whether or not its methods are `async`."""

    async def reset(self, row: Mapping[str, Any], seed: int) -> list[Message] | str | None:
        reset = self.instance.reset
        found: list[Message] | str | None = await self._run(
            reset, **accepted(reset, {"row": dict(row), "seed": seed})
        )
        return found

    async def step(self, reply: Reply) -> Step:
        step: Step = await self._run(self.instance.step, reply)
        return step

    async def final_reward(self) -> None:
        """Its steps have given all of it."""


class AgentEnv(Played):
    """Runs an instance that has a loop of its own."""

    @property
    def is_async(self) -> bool:
        """Whether it runs as a coroutine, which can be cancelled."""
        return inspect.iscoroutinefunction(self.instance.run)

    async def run(self, offered: Mapping[str, Any]) -> object:
        """What the instance's `run` returns; offered: arguments that it may name."""
        run = self.instance.run
        return await self._run(run, **accepted(run, offered))


Playable: TypeAlias = StepEnv | ToolEnv


def is_agent(factory: object) -> bool:
    """Whether a class has a loop of its own."""
    return inspect.isclass(factory) and issubclass(factory, Agent)


def load_class(path: str, stubs: Path | None = None) -> Callable[..., Any]:
    """The class, or function that makes environments, which `task.environment` names.

    Args:
        path: module:Class or path.py:Class.
        stubs: See `cohort.rewards.loading.load_function`.

    Raises:
        EnvironmentLoadError: There is no such thing, or it is no environment.
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
    if inspect.isclass(factory) and not has_step(factory) and not tool_names(factory):
        raise EnvironmentLoadError(
            f"task.environment={path} has neither a method `step` nor a public method to be a tool"
        )
    return factory


def make(factory: Callable[..., Any], options: Mapping[str, Any], run: Run) -> Playable:
    """A new environment for one episode.

    Raises:
        EnvironmentLoadError: The class cannot be constructed with `task.environment_options`.
    """
    instance = _instance(factory, options)
    if isinstance(instance, Agent):
        raise EnvironmentLoadError(
            "task.environment is a function that makes agents: name their class in its place"
        )
    return StepEnv(instance, run) if has_step(instance) else ToolEnv(instance, run)


def make_agent(factory: Callable[..., Any], options: Mapping[str, Any], run: Run) -> AgentEnv:
    """A new agent for one episode; as `make`."""
    return AgentEnv(_instance(factory, options), run)


def _instance(factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        return factory(**options)
    except Exception as error:
        raise EnvironmentLoadError(
            f"task.environment could not be constructed with task.environment_options: "
            f"{error_tail(error, 1000)}"
        ) from error
