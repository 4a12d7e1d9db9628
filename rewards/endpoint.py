"""Questions to a model server over HTTP: bounded, remembered, and a failure is a value."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from cohort.actors.plain import JsonObject

Answer = TypeVar("Answer")

CACHED = 10_000


class Endpoint(Generic[Answer]):
    """A server that is asked about many things at a time, with OpenAI's client.

    Args:
        ask: Sends one request, anything that JSON can hold, with the client and reads the answer;
            what it raises is that request's error.
        base_url: As the client takes it.
        api_key_env: The environment variable with the key; None where the server needs none.
        concurrency: Requests at a time.
        retries: By the client, of what may pass: no connection, 408, 409, 429 and 5xx, with growing
            waits.
        timeout_s: Seconds for one request.
        deadline_s: Seconds for all of one call.

    Raises:
        ValueError: An option cannot work.
        ImportError: The package openai is missing.
    """

    def __init__(
        self,
        ask: Callable[[Any, Any], Awaitable[Answer]],
        base_url: str,
        api_key_env: str | None,
        concurrency: int,
        retries: int,
        timeout_s: float,
        deadline_s: float,
    ) -> None:
        # Imported here, once a process, so that a missing package ends the run before it starts.
        import openai

        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        key = "none"
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise ValueError(
                    f"{api_key_env} is not set here: set it, and list it as secrets: "
                    f"[{api_key_env}] of this reward function"
                )
            key = os.environ[api_key_env]
        self._new_client = lambda: openai.AsyncOpenAI(
            base_url=base_url, api_key=key, timeout=timeout_s, max_retries=retries
        )
        self._ask = ask
        # A URL may hold a password.
        self._shown = urlsplit(base_url).netloc.rpartition("@")[2]
        self._concurrency = concurrency
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._known: OrderedDict[str, Answer] = OrderedDict()

    async def answers(self, requests: Sequence[Any | None]) -> list[Answer | Exception | None]:
        """Ask the server; the same request is asked once, and its answer remembered.

        Args:
            requests: None where nothing is to be asked.

        Returns:
            For each request its answer or its error; None for None.
        """
        keys = [None if request is None else _digest(request) for request in requests]
        pairs = zip(keys, requests, strict=True)
        new = {key: item for key, item in pairs if key is not None and key not in self._known}
        failures = await self._ask_all(new)
        results: list[Answer | Exception | None] = []
        for key in keys:
            if key is None:
                results.append(None)
            elif key in failures:
                results.append(failures[key])
            else:
                self._known.move_to_end(key)
                results.append(self._known[key])
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return results

    async def _ask_all(self, new: JsonObject) -> dict[str, Exception]:
        """Ask what is new and remember the answers; returns what failed."""
        if not new:
            return {}
        slots = asyncio.Semaphore(self._concurrency)
        # One client a call: it belongs to the event loop that it was first used in.
        async with self._new_client() as client:
            tasks = {
                key: asyncio.create_task(self._one(client, slots, request))
                for key, request in new.items()
            }
            _, late = await asyncio.wait(tasks.values(), timeout=self._deadline_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        failures: dict[str, Exception] = {}
        for key, task in tasks.items():
            error = None if task in late else task.exception()
            if task in late:
                failures[key] = TimeoutError(
                    f"{self._shown} did not answer within {self._deadline_s:g} s (deadline_s)"
                )
            elif isinstance(error, Exception):
                failures[key] = error
            else:
                self._known[key] = task.result()
        return failures

    async def _one(self, client: Any, slots: asyncio.Semaphore, request: Any) -> Answer:
        import openai

        async with slots:
            try:
                return await self._ask(client, request)
            # The client's own words for these two do not say which server, and which limit.
            except openai.APITimeoutError as error:
                raise TimeoutError(
                    f"{self._shown} did not answer within {self._timeout_s:g} s (timeout_s)"
                ) from error
            except openai.APIConnectionError as error:
                raise ConnectionError(
                    f"no connection to {self._shown}: is the server running, and base_url right?"
                ) from error


def unicode_text(text: str) -> str:
    """The text with what is not Unicode (half of a surrogate pair) replaced: it cannot be sent."""
    return text.encode(errors="replace").decode()


def _digest(request: Any) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
