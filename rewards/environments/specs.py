"""From the config to what a worker of environments needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cohort.actors.plain import JsonObject
from cohort.rewards.config import EnvironmentsConfig, TaskConfig
from cohort.rewards.environments.episode import Limits
from cohort.rewards.environments.loading import environment_path, is_agent, load_class
from cohort.rewards.environments.tools import has_served, has_step, tool_schemas
from cohort.rewards.environments.worker import EnvironmentSpec


def load_environment(task: TaskConfig, base: Path | None = None) -> Callable[..., object]:
    """The class, or function, that `task.environment` names.

    Raises:
        EnvironmentLoadError: It cannot be loaded.
    """
    assert task.environment is not None
    return load_class(environment_path(task.environment, base or Path.cwd()))


def find_tools(task: TaskConfig, base: Path | None = None) -> list[JsonObject]:
    """The schemas of the environment's tools; empty where it has `step` of its own and no `tools`,
    is an agent (its requests bring them), or a function.

    Raises:
        EnvironmentLoadError: It cannot be loaded, or a tool cannot be described.
    """
    factory = load_environment(task, base)
    if is_agent(factory):
        return []
    if has_step(factory):
        # One that answers itself may say which tools it knows.
        return list(getattr(factory, "tools", ()))
    tools = tool_schemas(factory)
    if has_served(factory):
        tools += factory.served(task.environment_options)
    return tools


def gives_rewards(task: TaskConfig, base: Path | None = None) -> bool:
    """Whether the environment may give rewards: a class of tools does so by `get_reward` only.

    Raises:
        EnvironmentLoadError: It cannot be loaded.
    """
    factory = load_environment(task, base)
    return (
        not isinstance(factory, type)
        or is_agent(factory)
        or has_step(factory)
        or hasattr(factory, "get_reward")
    )


def environment_spec(
    task: TaskConfig,
    config: EnvironmentsConfig,
    *,
    model_path: str,
    template_arguments: JsonObject,
    max_length: int,
    temperature: float = 1.0,
    base: Path | None = None,
) -> EnvironmentSpec:
    """What every worker gets.

    Args:
        task: The section `task`, with an environment.
        config: The section `environments`.
        model_path: Of the tokenizer.
        template_arguments: model.template_arguments.
        max_length: Tokens of the longest sequence.
        temperature: Of the rollouts.
        base: The folder that paths of classes are relative to; None: the working folder.
    """
    assert task.environment is not None
    limits = Limits(
        config.max_turns,
        config.max_tool_calls,
        config.step_timeout_s,
        config.episode_timeout_s,
        max_length,
    )
    return EnvironmentSpec(
        path=environment_path(task.environment, base or Path.cwd()),
        options=task.environment_options,
        tools=find_tools(task, base),
        model_path=model_path,
        template_arguments=template_arguments,
        history=task.history,
        tool_parser=config.tool_parser,
        limits=limits,
        message_chars=config.message_chars,
        memory_bytes=config.memory_bytes,
        secrets=tuple(config.secrets),
        agent=is_agent(load_environment(task, base)),
        temperature=temperature,
    )
