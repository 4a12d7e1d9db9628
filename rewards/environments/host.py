"""The process in which environments run: many episodes at once, each an instance of its own.

It talks to its worker over one socket, in frames. In: pickled calls (number, episode, what to do,
arguments). Out: JSON only, because the parent must not unpickle what foreign code may forge; an
answer has the number of its call. Methods that are not `async` run in a thread each.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cohort.actors.plain import JsonObject
from cohort.rewards.child import bound_memory, die_with_parent, discard_output
from cohort.rewards.environments.base import (
    EnvironmentLoadError,
    Message,
    Reply,
    Step,
    readable,
)
from cohort.rewards.environments.frames import MAX_REPLY, read_frame, write_frame
from cohort.rewards.environments.loading import (
    AgentEnv,
    Playable,
    is_agent,
    load_class,
    make,
    make_agent,
)
from cohort.rewards.results import MAX_MESSAGE, MAX_SCORE, encodable, error_tail

# Calls of environments that are not `async` and run at one time.
THREADS = 512
# Of the public attributes of an environment, as JSON.
MAX_STATE = 1 << 16
# Of one answer, and of a message's role, name and id.
MAX_MESSAGES = 1000
MAX_WORD = 200


class Host:
    """Runs the episodes of one process."""

    def __init__(self, hello: JsonObject) -> None:
        self._factory = load_class(hello["path"], Path(hello["stubs"]))
        self._options = hello["options"]
        self._longest = hello["message_chars"]
        self._threads = ThreadPoolExecutor(THREADS)
        self._episodes: dict[str, Playable | AgentEnv] = {}
        # The calls in which agents run.
        self._running: dict[str, asyncio.Task[object]] = {}

    async def answer(self, episode: str, what: str, arguments: JsonObject) -> JsonObject:
        """What an environment says to a call, as JSON can hold it."""
        if what == "ping":
            return {}
        if what == "try":
            # Whether an instance can be made at all. It plays nothing, so it is not closed either.
            making: Callable[..., object] = make_agent if is_agent(self._factory) else make
            making(self._factory, self._options, self._run)
            return {}
        if what == "close":
            return await self._close(episode, arguments["score"])
        if what == "run":
            return await self._run_agent(episode, arguments)
        if what == "reset":
            playable = make(self._factory, self._options, self._run)
            self._episodes[episode] = playable
            found = await playable.reset(arguments["row"], arguments["seed"])
            messages, cut = as_messages(found, self._longest)
            return {"messages": messages, "cut": cut}
        stepped = self._episodes[episode]
        assert not isinstance(stepped, AgentEnv), "the worker steps what it has reset"
        step = await stepped.step(Reply(**arguments["reply"]), arguments["seconds"])
        return as_json(step, self._longest)

    async def _run_agent(self, episode: str, arguments: JsonObject) -> JsonObject:
        agent = make_agent(self._factory, self._options, self._run)
        call = asyncio.current_task()
        assert call is not None, "a coroutine runs in a task"
        self._episodes[episode], self._running[episode] = agent, call
        try:
            return as_outcome(await agent.run(arguments))
        finally:
            self._running.pop(episode, None)

    async def _close(self, episode: str, score: bool) -> JsonObject:
        playable = self._episodes.pop(episode, None)
        call = self._running.pop(episode, None)
        if playable is None:
            return {"reward": None, "state": {}}
        if call is not None:
            # One that runs in a thread can only be waited for; its requests are refused by now.
            if isinstance(playable, AgentEnv) and playable.is_async:
                call.cancel()
            await asyncio.wait([call])
        try:
            reward = await playable.final_reward() if score else None
            state = public_state(playable.instance)
        finally:
            await playable.close()
        return {"reward": number(reward, "get_reward returned"), "state": state}

    async def _run(self, function: Any, /, *args: Any, **named: Any) -> Any:
        """Call a function of the environment; in a thread, unless it is `async`.

        The slash: arguments of tools, and columns, may be called `function` and `self`.
        """
        if inspect.iscoroutinefunction(function):
            return await function(*args, **named)

        def call() -> Any:
            try:
                return function(*args, **named)
            except StopIteration as error:
                # No future takes it, and whoever waits would wait for ever.
                raise RuntimeError(f"StopIteration: {error}") from error

        result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return await result if inspect.isawaitable(result) else result


def as_messages(found: object, longest: int) -> tuple[list[Message], int]:
    """What an environment says, as messages, and how many of them were cut at `longest` letters.

    Raises:
        TypeError: It is neither a text nor a list of messages.
        ValueError: It is too many of them.
    """
    if found is None:
        return [], 0
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    if not isinstance(found, Sequence) or isinstance(found, bytes):
        raise TypeError(f"messages must be a text or a list, not a {type(found).__name__}")
    if len(found) > MAX_MESSAGES:
        raise ValueError(f"{len(found)} messages at once; an answer has {MAX_MESSAGES} at most")
    messages, cut = [], 0
    for message in found:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message must have role and content, got {str(message)[:200]}")
        if message["role"] == "assistant":
            raise TypeError("an environment cannot speak as the assistant")
        content = message.get("content")
        if not isinstance(content, str):
            raise TypeError(f"a message's content must be a text, not a {type(content).__name__}")
        content, shortened = readable(content, longest)
        cut += shortened
        kept = {
            key: encodable(str(message[key])[:MAX_WORD])
            for key in ("role", "name", "tool_call_id")
            if key in message
        }
        messages.append({**kept, "content": content})
    return messages, cut


def as_json(step: object, longest: int) -> JsonObject:
    """A step as JSON can hold it.

    Raises:
        TypeError: It is no `Step`, or a part of it has another type than it should.
        ValueError: A reward or a metric that is not finite.
    """
    if not isinstance(step, Step):
        raise TypeError(f"step must return a Step, not a {type(step).__name__}")
    if step.failure is not None and not isinstance(step.failure, str):
        raise TypeError("Step.failure must be a text that says why")
    messages, cut = as_messages(step.messages, longest)
    metrics = {
        str(name): number(value, f"metrics[{name}] is")
        for name, value in step.metrics.items()
        if value is not None
    }
    return {
        "messages": messages,
        "cut": cut,
        "reward": number(step.reward, "the reward is"),
        "done": bool(step.done),
        "metrics": metrics,
        "failure": None if step.failure is None else encodable(step.failure[:MAX_MESSAGE]),
    }


def as_outcome(found: object) -> JsonObject:
    """What an agent's `run` returned, as JSON can hold it.

    Raises:
        TypeError: It is neither a number nor numbers by the ids of completions.
        ValueError: A number that is not finite.
    """
    if not isinstance(found, Mapping):
        return {"reward": number(found, "run returned")}
    by_id = {str(key): number(value, f"run returned, for {key},") for key, value in found.items()}
    return {"rewards": by_id}


def number(value: Any, what: str) -> float | None:
    """A float within ±MAX_SCORE, or None.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite, or out of range.
    """
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} {str(value)[:100]!r}, which is not a number") from None
    # NaN is beyond it, too.
    if not abs(found) <= MAX_SCORE:
        raise ValueError(f"{what} {found:g}, not a finite number within ±{MAX_SCORE:g}")
    return found


def public_state(instance: object) -> JsonObject:
    """The public attributes of an environment that JSON can hold, as far as they are small."""
    found: JsonObject = {}
    room = MAX_STATE
    # A copy: a thread of the environment may still add to it.
    for name, value in dict(getattr(instance, "__dict__", {})).items():
        if name.startswith("_"):
            continue
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            continue
        if len(text) <= room:
            room -= len(text)
            found[name] = json.loads(text)
    return found


async def serve(connection: socket.socket) -> None:
    """Answer calls until the connection closes."""
    reader, writer = await asyncio.open_connection(sock=connection)

    def reply(body: str) -> None:
        write_frame(writer, body.encode())

    hello = json.loads(await read_frame(reader))
    bound_memory(hello["memory_bytes"])
    try:
        host = Host(hello)
    except EnvironmentLoadError as error:
        reply(json.dumps({"error": str(error)}))
        await writer.drain()
        return
    reply(json.dumps({"ready": True}))
    await writer.drain()
    discard_output()

    async def call(number: int, episode: str, what: str, payload: bytes) -> None:
        try:
            # In here: a row that cannot be unpickled costs its own episode.
            found = await host.answer(episode, what, pickle.loads(payload))
            # And an answer that cannot be written, or would not be read.
            body = json.dumps({"call": number} | found)
            if len(body) > MAX_REPLY:
                raise ValueError(f"an answer of {len(body)} bytes; {MAX_REPLY} are read at most")
        # A boundary to code of others: whatever it raises becomes a value.
        except BaseException as error:  # noqa: BLE001
            body = json.dumps({"call": number, "failed": error_tail(error)})
        reply(body)

    running: set[asyncio.Task[None]] = set()
    while True:
        task = asyncio.create_task(call(*pickle.loads(await read_frame(reader))))
        running.add(task)
        task.add_done_callback(running.discard)


def main(descriptor: int, parent: int) -> None:
    """Serve the worker whose process is `parent` on socket `descriptor` until it closes."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    connection.setblocking(False)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        asyncio.run(serve(connection))
    # Without waiting for threads: one may hang.
    os._exit(0)
