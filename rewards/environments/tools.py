"""Environments whose public methods are tools, with the conventions of TRL's environments.

    class Shop:
        def reset(self, city, **row):          # optional; the columns of the row by name
            self.city, self.booked = city, []

        def price(self, hotel: str) -> float:  # a tool: type hints and docstring are its schema
            \"\"\"Price of a night.

            Args:
                hotel: Its name.
            \"\"\"
            return PRICES[self.city][hotel]

        def get_reward(self) -> float:         # optional; once, at the end
            return float(len(self.booked) == 1)

The episode ends with the first reply that calls no tool, or when a tool has set `self.done = True`.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cohort.rewards.environments.base import EnvironmentLoadError, Message, Reply, Step, ToolCall
from cohort.rewards.loading import BY_NAME
from cohort.rewards.results import error_tail

# Public methods that are no tools.
OURS = frozenset({"reset", "step", "close", "get_reward"})

Run = Callable[..., Awaitable[Any]]


def has_step(factory: Any) -> bool:
    """Whether a class answers replies itself."""
    return callable(getattr(factory, "step", None))


def tool_names(factory: Any) -> list[str]:
    """The public methods of a class that are tools, in the order in which they are defined."""
    names = [name for cls in reversed(getattr(factory, "__mro__", ())) for name in vars(cls)]
    return [
        name
        for name in dict.fromkeys(names)
        if not name.startswith("_")
        and name not in OURS
        and callable(inspect.getattr_static(factory, name, None) and getattr(factory, name))
    ]


def tool_schemas(factory: Any) -> list[dict[str, Any]]:
    """The JSON schema of every tool, for the chat template.

    Raises:
        EnvironmentLoadError: A tool has no docstring or no type hint for an argument.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    schemas = []
    for name in tool_names(factory):
        # Bound to something, so that `self` is no argument.
        method = types.MethodType(getattr(factory, name), object())
        try:
            schemas.append(get_json_schema(method))
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise EnvironmentLoadError(
                f"the tool {factory.__name__}.{name} cannot be described to the model: {error}"
            ) from error
    return schemas


class Played:
    """An instance of the user's class, as its process plays it.

    Args:
        instance: Of the user's class.
        run: Calls a function, in a thread unless it is `async`.
    """

    def __init__(self, instance: Any, run: Run) -> None:
        self.instance = instance
        self._run = run

    async def final_reward(self) -> float | None:
        """What `get_reward` gives at the end, if there is one."""
        return await self._optional("get_reward")

    async def close(self) -> None:
        """Call the instance's own `close`, if there is one."""
        await self._optional("close")

    async def _optional(self, name: str) -> Any:
        method = getattr(self.instance, name, None)
        return None if method is None else await self._run(method)


class ToolEnv(Played):
    """Plays an episode of an instance whose public methods are tools."""

    def __init__(self, instance: Any, run: Run) -> None:
        super().__init__(instance, run)
        self._tools = set(tool_names(type(instance)))

    async def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | str | None:
        reset = getattr(self.instance, "reset", None)
        if reset is None:
            return None
        found: Sequence[Message] | str | None = await self._run(
            reset, **accepted(reset, {**row, "seed": seed})
        )
        return found

    async def step(self, reply: Reply) -> Step:
        if not reply.tool_calls:
            return Step(done=True)
        messages, wrong = [], 0
        for call in reply.tool_calls:
            text, failed = await self._call(call)
            wrong += failed
            messages.append(
                {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}
            )
        # An attribute that the user's class may have.
        done = bool(getattr(self.instance, "done", False))
        return Step(messages, done=done, metrics={"tool_errors": float(wrong)})

    async def _call(self, call: ToolCall) -> tuple[str, bool]:
        """What the model is told of a call, and whether the call was wrong."""
        if call.error is not None:
            return f"error: {call.error}", True
        if call.name not in self._tools:
            known = ", ".join(sorted(self._tools))
            return f"error: there is no tool {call.name!r}; the tools are {known}", True
        method = getattr(self.instance, call.name)
        try:
            inspect.signature(method).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}", True
        try:
            return as_text(await self._run(method, **call.arguments)), False
        except Exception as error:  # noqa: BLE001 - a boundary: the model is told, and it is counted
            return f"error: {error_tail(error, 500)}", True


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function names, or all that are offered where it takes `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        return dict(offered)
    return {
        item.name: offered[item.name]
        for item in parameters
        if item.kind in BY_NAME and item.name in offered
    }


def as_text(value: object) -> str:
    """What a tool returned, as the model reads it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
