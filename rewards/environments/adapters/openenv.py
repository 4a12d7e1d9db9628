"""Environments of OpenEnv: `task.environment: openenv`.

A server is spoken to in OpenEnv's own protocol (JSON over a WebSocket), without its package: the
environment may have packages that Cohort's would not bear.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from cohort.actors.plain import JsonObject
from cohort.rewards.environments.base import EnvironmentLoadError, Message, Reply, Step
from cohort.rewards.environments.tools import accepted
from cohort.rewards.loading import RewardLoadError, load_attribute

T = TypeVar("T")
# Between two looks for a free session on a server that has none.
RETRY_S = 0.5
MAX_MESSAGE = 64 << 20
# What an observation holds beside what the environment says.
BESIDE = ("done", "reward", "metadata")


class WrongAction(Exception):
    """The environment cannot take the action; the message is for the model."""


class OpenEnv:
    """Plays an environment of OpenEnv, on a server or in this process.

    Every episode has a session, or an instance, of its own. `reset` gets the seed and the columns
    that are named. An action that the environment's schema refuses is told to the model, and
    counted as one of `tool_errors`. Inherit from it and override `action` or `messages` for another
    form.

    Args:
        url: Of the server (http:// or ws://).
        environment: Instead of it, module:Class or path.py:Class of an Environment.
        action: Then also the class of its actions.
        options: Keyword arguments of the environment's class.
        text: The field of the action that gets the reply's text. None: the reply is the whole
            action, as a JSON object.
        show: The field of the observation that the model reads. None: all of it, as JSON.
        columns: Those of the row that `reset` gets.
        wait_s: For a free session, where the server has no more of them.

    Example:
        task.environment: openenv
        task.environment_options: {url: "http://localhost:8000", text: message, show: echoed}
    """

    def __init__(
        self,
        url: str | None = None,
        environment: str | None = None,
        action: str | None = None,
        options: Mapping[str, object] | None = None,
        text: str | None = None,
        show: str | None = None,
        columns: Sequence[str] = (),
        wait_s: float = 20.0,
    ) -> None:
        if (url is None) == (environment is None) or (environment is None) != (action is None):
            raise ValueError("openenv needs `url`, or `environment` and `action`")
        self._text, self._show, self._columns = text, show, tuple(columns)
        self._side: _Side
        if url is not None:
            self._side = _Remote(url, wait_s)
        else:
            self._side = _Local(_load(environment), _load(action), options or {})

    def action(self, reply: Reply) -> JsonObject:
        """The action that a reply means.

        Raises:
            WrongAction: None; the message is for the model.
        """
        if self._text is not None:
            return {self._text: reply.text}
        try:
            found = json.loads(reply.text)
        except (ValueError, RecursionError) as error:
            raise WrongAction(f"the action is not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise WrongAction("the action must be a JSON object")
        return found

    def messages(self, observation: JsonObject) -> Sequence[Message] | str:
        """What the model reads of an observation."""
        if self._show is not None:
            return str(observation[self._show])
        shown = {name: value for name, value in observation.items() if name not in BESIDE}
        return json.dumps(shown, ensure_ascii=False) if shown else ()

    async def reset(self, row: Mapping[str, object], seed: int) -> Sequence[Message] | str:
        """Begin an episode of the environment."""
        named = {name: row[name] for name in self._columns}
        made = await self._side.reset({"seed": seed, **named})
        return self.messages(made["observation"])

    async def step(self, reply: Reply) -> Step:
        """One step of the environment."""
        try:
            made = await self._side.step(self.action(reply))
        except WrongAction as error:
            return Step(f"error: {error}", metrics={"tool_errors": 1.0})
        return Step(self.messages(made["observation"]), made.get("reward"), bool(made.get("done")))

    async def close(self) -> None:
        """End the session."""
        await self._side.close()


class _Side(Protocol):
    """Where the environment is. Answers: `observation`, `reward` and `done`."""

    async def reset(self, data: JsonObject) -> JsonObject: ...

    async def step(self, action: JsonObject) -> JsonObject: ...

    async def close(self) -> None: ...


class _Remote:
    """A session on a server."""

    def __init__(self, url: str, wait_s: float) -> None:
        # ws:// and http:// alike; aiohttp takes both.
        self._url, self._wait_s = f"{url.rstrip('/')}/ws", wait_s
        self._http: Any = None
        self._socket: Any = None

    async def reset(self, data: JsonObject) -> JsonObject:
        import aiohttp

        self._http = aiohttp.ClientSession()
        give_up = time.monotonic() + self._wait_s
        while True:
            self._socket = await self._http.ws_connect(self._url, max_msg_size=MAX_MESSAGE)
            answer = await self._ask("reset", data)
            full = answer["type"] == "error" and answer["data"].get("code") == "CAPACITY_REACHED"
            if not full or time.monotonic() > give_up:
                return _observation(answer)
            await self._socket.close()
            await asyncio.sleep(RETRY_S)

    async def step(self, action: JsonObject) -> JsonObject:
        answer = await self._ask("step", dict(action))
        if answer["type"] == "error" and answer["data"].get("code") == "VALIDATION_ERROR":
            raise WrongAction(_why(answer["data"].get("errors", ())))
        return _observation(answer)

    async def _ask(self, kind: str, data: JsonObject) -> JsonObject:
        import aiohttp

        # A server without a free session says so and closes before it reads.
        with contextlib.suppress(ConnectionError):
            await self._socket.send_json({"type": kind, "data": data})
        message = await self._socket.receive()
        if message.type != aiohttp.WSMsgType.TEXT:
            raise ConnectionError(f"the OpenEnv server at {self._url} has ended the session")
        answer: JsonObject = json.loads(message.data)
        return answer

    async def close(self) -> None:
        try:
            if self._socket is not None and not self._socket.closed:
                await self._socket.send_json({"type": "close"})
                await self._socket.close()
        finally:
            if self._http is not None:
                await self._http.close()


class _Local:
    """An instance in this process. All its calls are made by one thread, as some demand."""

    def __init__(
        self, environment: Callable[..., object], action: Any, options: Mapping[str, object]
    ) -> None:
        self._environment, self._action, self._options = environment, action, options
        self._thread = ThreadPoolExecutor(1)
        # One event loop for all calls: what an `async` environment keeps belongs to its loop.
        self._loop = asyncio.Runner()
        self._made: Any = None

    async def reset(self, data: JsonObject) -> JsonObject:
        self._made = await self._run(lambda: self._environment(**self._options))
        given = accepted(self._made.reset, data)
        return await self._observe(lambda: self._loop.run(self._made.reset_async(**given)))

    async def step(self, action: JsonObject) -> JsonObject:
        from pydantic import ValidationError

        try:
            made = self._action.model_validate(dict(action))
        except ValidationError as error:
            raise WrongAction(_why(error.errors())) from None
        return await self._observe(lambda: self._loop.run(self._made.step_async(made)))

    async def _observe(self, call: Callable[[], Any]) -> JsonObject:
        found = await self._run(call)
        observation = found.model_dump(mode="json")
        return {"observation": observation, "reward": found.reward, "done": found.done}

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def close(self) -> None:
        try:
            if self._made is not None:
                await self._run(self._made.close)
        finally:
            await self._run(self._loop.close)
            self._thread.shutdown(wait=False)


def _observation(answer: JsonObject) -> JsonObject:
    if answer["type"] == "error":
        data = answer["data"]
        raise RuntimeError(f"the OpenEnv server: {data.get('code')}: {data.get('message')}")
    found: JsonObject = answer["data"]
    return found


def _why(errors: Any) -> str:
    """What pydantic found wrong, in words for the model."""
    lines = [f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in errors]
    return "; ".join(lines) or "the action is not valid"


def _load(path: str | None) -> Any:
    try:
        return load_attribute(str(path))
    except RewardLoadError as error:
        raise EnvironmentLoadError(f"task.environment_options: {error}") from error
