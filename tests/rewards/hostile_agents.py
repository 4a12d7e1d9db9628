"""Agents with a loop of their own: some that do it right, and some that do everything wrong."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import openai

import cohort

TOOL = {
    "type": "function",
    "function": {
        "name": "price",
        "description": "Price of a stay.",
        "parameters": {"type": "object", "properties": {"hotel": {"type": "string"}}},
        "strict": True,
    },
}
OTHERS_KEY: dict[str, str] = {}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


class Chat(cohort.Agent):
    """Asks what the row says, one question after the other; keeps what it got."""

    def __init__(self) -> None:
        self.got: list[str | None] = []
        self.ids: list[str] = []

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> Any:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        messages: list[Any] = list(row["prompt"])
        for question in [None, *row.get("questions", ())]:
            if question is not None:
                messages.append(user(question))
            asked = await client.chat.completions.create(
                model="policy", messages=messages, **row.get("keys", {})
            )
            message = asked.choices[0].message
            self.got.append(message.content)
            self.ids.append(asked.id)
            # As most programs do it: all fields of the reply, the empty ones too.
            messages.append(message.model_dump())
        return row.get("reward", 1.0)


class ByCompletion(Chat):
    """Rewards each of its requests by itself."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> Any:
        await super().run(row, base_url, api_key)
        return dict(zip(self.ids, row["rewards"], strict=True))


class Shopper(cohort.Agent):
    """Calls the tool that the model asks for, in a thread, and ends with a reply without calls."""

    def run(self, row: Mapping[str, Any], base_url: str, api_key: str, model: str) -> None:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        messages: list[Any] = [*row["prompt"]]
        self.calls: list[list[str]] = []
        while True:
            reply = client.chat.completions.create(
                model=model, messages=messages, tools=[TOOL], **row.get("keys", {})
            )
            self.finish = reply.choices[0].finish_reason
            message = reply.choices[0].message
            messages.append(message)
            self.last = message.content
            if not message.tool_calls:
                return
            for call in message.tool_calls:
                self.calls.append([call.function.name, call.function.arguments])
                hotel = json.loads(call.function.arguments).get("hotel")
                answer = f"{hotel}: 90 EUR"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})

    def get_reward(self) -> float:
        return float(len(self.calls))


class Streams(cohort.Agent):
    """Reads streams, of both clients."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        options: dict[str, Any] = {
            "model": "policy",
            "messages": row["prompt"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "tools": [TOOL],
        }
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
        self.chunks = [
            chunk.model_dump() async for chunk in await client.chat.completions.create(**options)
        ]

        def read() -> list[Any]:
            sync = openai.OpenAI(base_url=base_url, api_key=api_key)
            return [chunk.model_dump() for chunk in sync.chat.completions.create(**options)]

        self.others = await asyncio.to_thread(read)
        return 1.0


class Raw(cohort.Agent):
    """Sends one request as the row says and keeps what comes back, then a good one."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        keys = {"model": "policy", "messages": row["prompt"], **row["keys"]}
        try:
            await client.chat.completions.create(**keys)
        except openai.APIStatusError as error:
            self.status, self.param, self.code = error.status_code, error.param, error.code
            self.error = error.body["message"]  # type: ignore[index]
        await client.chat.completions.create(model="policy", messages=row["prompt"])
        return 1.0


class SideBySide(cohort.Agent):
    """Three requests at one time, then one behind the second of their replies."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)

        async def ask(messages: list[Any]) -> Any:
            made = await client.chat.completions.create(model="policy", messages=messages)
            return made.choices[0].message

        prompt = list(row["prompt"])
        replies = await asyncio.gather(*(ask(prompt) for _ in range(3)))
        self.got = [reply.content for reply in replies]
        await ask([*prompt, replies[1], user("Go on.")])
        return 1.0


class Forgets(cohort.Agent):
    """Rewrites its history: the first exchange becomes a summary."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)

        async def ask(messages: list[Any]) -> Any:
            made = await client.chat.completions.create(model="policy", messages=messages)
            return made.choices[0].message.content

        first = await ask(row["prompt"])
        told = [*row["prompt"], {"role": "assistant", "content": f"So: {first}"}, user("More.")]
        second = await ask(told)
        await ask([*told, {"role": "assistant", "content": second}, user("And more.")])
        return 1.0


class Careful(Chat):
    """Gives itself a reward when a limit ends its requests."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        try:
            await super().run(row, base_url, api_key)
        except openai.BadRequestError as error:
            self.code = error.code
            return 0.25
        return 1.0


class Careless(Chat):
    """Lets the error through, and is asked for its reward."""

    def get_reward(self) -> float:
        return 0.5


class Keys(Chat):
    """Tries keys that are not its own."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        name, _, secret = api_key.partition(".")
        self.refused = []
        tried = ["none", "", f"{name}.x{secret}", f"{name}.", "x" + api_key, OTHERS_KEY.get("dead")]
        for key in tried:
            client = openai.AsyncOpenAI(base_url=base_url, api_key=key or "-", max_retries=0)
            for ask in (
                lambda c=client: c.models.list(),
                lambda c=client: c.chat.completions.create(model="policy", messages=row["prompt"]),
            ):
                try:
                    await ask()
                except openai.AuthenticationError as error:
                    self.refused.append(error.code)
        own = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
        self.models = [model.id async for model in await own.models.list()]
        OTHERS_KEY["dead"] = api_key
        await super().run(row, base_url, api_key)
        return 1.0


class Leaves(cohort.Agent):
    """Goes away while the model answers, by the clock or in the middle of a stream."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        keys: dict[str, Any] = {"model": "policy", "messages": row["prompt"]}
        try:
            await client.with_options(timeout=0.3).chat.completions.create(**keys)
        except openai.APITimeoutError:
            self.left = True
        stream = await client.chat.completions.create(**keys, stream=True)
        async for _ in stream:
            break
        await stream.close()
        made = await client.chat.completions.create(**keys)
        self.got = made.choices[0].message.content
        return 1.0


class Wrong(Chat):
    """Does what the row says, before or after a request."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> Any:
        how = row["how"]
        if how == "never asks":
            return 1.0
        if how == "hangs at first":
            await asyncio.sleep(3600)
        await super().run({**row, "questions": ()}, base_url, api_key)
        return await {
            "is fine": self.value(1.0),
            "raises": self.broken(),
            "nan": self.value(float("nan")),
            "text": self.value("good"),
            "unknown completion": self.value({"chatcmpl-x": 1.0}),
            "hangs": asyncio.sleep(3600),
            "blocks": self.blocks(),
            "exits": self.exits(),
        }[how]

    async def value(self, value: Any) -> Any:
        return value

    async def broken(self) -> None:
        raise RuntimeError("the browser has crashed")

    async def blocks(self) -> None:
        time.sleep(3600)

    async def exits(self) -> None:
        os._exit(3)


class HangsInThread(cohort.Agent):
    """Not `async`: it cannot be cancelled."""

    def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        client.chat.completions.create(model="policy", messages=row["prompt"])
        if row.get("hang"):
            time.sleep(3600)
        return 1.0


class Told(cohort.Agent):
    """Puts the row's texts into a system message, a tool's result and a message of the user."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
        messages: list[Any] = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": row["text"]}]},
        ]
        await client.chat.completions.create(model="policy", messages=messages)
        return 1.0


class NoRun(cohort.Agent):
    """Has forgotten what makes it an agent."""


def makes_agents() -> Chat:
    return Chat()
