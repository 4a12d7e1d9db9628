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
Tools that are known only once a server was asked for them: `ServedTools`.
"""

from __future__ import annotations

import inspect
import json
import time
import types
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeGuard

from cohort.actors.plain import JsonObject
from cohort.rewards.environments.base import (
    EnvironmentFailed,
    EnvironmentLoadError,
    Message,
    Reply,
    Step,
    ToolCall,
)
from cohort.rewards.loading import BY_NAME
from cohort.rewards.results import error_tail

# Public methods that are no tools.
OURS = frozenset({"reset", "step", "close", "get_reward"})
# Of the time for one answer: no call of a tool begins after it.
BEGIN_BEFORE = 0.5

Run = Callable[..., Awaitable[Any]]


class UnknownTool(Exception):
    """A server has no such tool. known: the names of those that it has."""

    def __init__(self, known: Sequence[str]) -> None:
        super().__init__(f"the tools are {', '.join(known)}")
        self.known = tuple(known)


class ToolError(Exception):
    """A call that went wrong; the message is what the model is told, without a traceback."""


class ServedTools:
    """An environment whose tools a server describes and runs. To be inherited from.

    Public methods of the class are tools as well; `reset` and `get_reward` are as in any class with
    tools.
    """

    @classmethod
    def served(cls, options: JsonObject) -> list[JsonObject]:
        """The schemas of the tools, asked for once, before anything starts.

        Args:
            options: `task.environment_options`.

        Raises:
            EnvironmentLoadError: The server cannot say.
        """
        raise NotImplementedError

    async def call_served(self, name: str, arguments: Mapping[str, object]) -> object:
        """What a tool of the server returns, for the model to read.

        Raises:
            UnknownTool: The server has no such tool.
            EnvironmentFailed: The server is gone, and the episode with it.
            Exception: The call was wrong: the model is told.
        """
        raise NotImplementedError


def has_step(factory: Any) -> bool:
    """Whether a class, or an instance, answers replies itself.

    A `step` whose arguments all have type hints, and which takes no reply, is a tool of that name.
    """
    step = getattr(factory, "step", None)
    return callable(step) and not _is_tool(step)


def _is_tool(step: Callable[..., object]) -> bool:
    taken = [item for item in inspect.signature(step).parameters.values() if item.name != "self"]
    return bool(taken) and all(
        item.name != "reply"
        and item.annotation is not item.empty
        and item.annotation is not Reply
        and not str(item.annotation).endswith("Reply")
        for item in taken
    )


def has_served(factory: Any) -> TypeGuard[type[ServedTools]]:
    """Whether a server has tools for a class."""
    return inspect.isclass(factory) and issubclass(factory, ServedTools)


def tool_names(factory: Any) -> list[str]:
    """The public methods of a class that are tools, in the order in which they are defined.

    As in TRL, only functions of the class are tools: not class methods, properties or classes.
    """
    classes = getattr(factory, "__mro__", ())
    names = [name for cls in reversed(classes) for name in vars(cls)]
    ours = OURS | set(vars(ServedTools) if has_served(factory) else ())
    return [
        name
        for name in dict.fromkeys(names)
        if not name.startswith("_")
        and (name not in ours or (name == "step" and not has_step(factory)))
        and inspect.isfunction(getattr(factory, name))
    ]


def tool_schemas(factory: Any) -> list[JsonObject]:
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
        method = getattr(factory, name)
        if not isinstance(inspect.getattr_static(factory, name), staticmethod):
            # Bound to something, so that `self` is no argument.
            method = types.MethodType(method, object())
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

    async def reset(self, row: Mapping[str, object], seed: int) -> Sequence[Message] | str | None:
        reset = getattr(self.instance, "reset", None)
        if reset is None:
            return None
        # A column called `seed` is the row's own, which the user wants.
        offered = accepted(reset, {"seed": seed, **row})
        found: Sequence[Message] | str | None = await self._run(reset, **offered)
        return found

    async def step(self, reply: Reply, seconds: float) -> Step:
        """Run the calls of a reply, one after another; `seconds`: the time for the answer."""
        if not reply.tool_calls:
            return Step(done=True)
        messages, wrong, began = [], 0, time.monotonic()
        for call in reply.tool_calls:
            spent = time.monotonic() - began
            if spent < BEGIN_BEFORE * seconds:
                try:
                    text, failed = await self._call(call)
                except EnvironmentFailed as error:
                    return Step(failure=f"{call.name}: {error}")
            else:
                # A model that calls many slow tools in a reply must not look like one that hangs.
                text, failed = f"error: not run, {spent:.0f} s after the first call", True
            wrong += failed
            messages.append(
                {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}
            )
        # An attribute that the user's class may have.
        done = bool(getattr(self.instance, "done", False))
        return Step(messages, done=done, metrics={"tool_errors": float(wrong)})

    async def _call(self, call: ToolCall) -> tuple[str, bool]:
        """What the model is told of a call, and whether the call was wrong.

        Raises:
            EnvironmentFailed: By the tool.
        """
        if call.error is not None:
            return f"error: {call.error}", True
        try:
            return as_text(await self._result(call)), False
        except EnvironmentFailed:
            raise
        except ToolError as error:
            return f"error: {error}", True
        # A boundary: the model is told, and it is counted.
        except BaseException as error:  # noqa: BLE001
            return f"error: {error_tail(error, 500)}", True

    async def _result(self, call: ToolCall) -> object:
        if call.name in self._tools:
            method = getattr(self.instance, call.name)
            try:
                inspect.signature(method).bind(**call.arguments)
            except TypeError as error:
                raise ToolError(f"{call.name}: {error}") from None
            return await self._run(method, **call.arguments)
        known: Sequence[str] = sorted(self._tools)
        if isinstance(self.instance, ServedTools):
            try:
                return await self.instance.call_served(call.name, call.arguments)
            except UnknownTool as error:
                known = sorted([*known, *error.known])
        raise ToolError(f"there is no tool {call.name!r}; the tools are {', '.join(known)}")


def accepted(function: Callable[..., object], offered: Mapping[str, object]) -> JsonObject:
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
