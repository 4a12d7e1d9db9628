"""Tools of MCP servers: `task.environment: mcp`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import string
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

try:
    import httpx2
    import mcp
    from mcp.client.streamable_http import streamable_http_client
    from mcp_types import CONNECTION_CLOSED
except ImportError as error:
    raise ImportError(f"{error}: install it with pip install 'cohort-rl[mcp]'") from error

from cohort.actors.plain import JsonObject
from cohort.actors.process import MARKER
from cohort.rewards.environments.base import EnvironmentFailed, EnvironmentLoadError
from cohort.rewards.environments.tools import ServedTools, ToolError, UnknownTool
from cohort.rewards.results import error_tail

logger = logging.getLogger(__name__)

Servers = Mapping[str, JsonObject]
Clients = Mapping[str, mcp.Client]
# For any answer of a server; calls have a shorter deadline of their own.
ANSWER_S = 60.0
# Sessions that open at one time in a process.
AT_ONCE = 8
UNLISTED = "the tools of the MCP servers cannot be listed"
KEYS = {"command", "args", "env", "cwd", "url", "headers"}


class McpTools(ServedTools):
    """The tools of MCP servers, over stdio or streamable HTTP.

    Each episode has a session of its own with every server: a process over stdio, which ends with
    the episode; a connection over HTTP. Inherit from it for a `reset`, a `get_reward` or tools of
    your own.

    Args:
        servers: Name -> server, in the form of `mcpServers` in other programs' settings: `command`,
            `args`, `env` and `cwd`, or `url` and `headers`. `${NAME}` in `env` and `headers` is an
            environment variable, which `environments.secrets` lets through.
        tools: Names of those that the model may use. None: all.
        timeout_s: For one call; then the model is told that it took too long.

    Example:
        task.environment: mcp
        task.environment_options:
          servers: {files: {command: python, args: [files_server.py]}}
    """

    def __init__(
        self, servers: Servers, tools: Sequence[str] | None = None, timeout_s: float = 10.0
    ) -> None:
        for name, server in servers.items():
            _check(name, server)
        self._servers, self._wanted, self._timeout_s = servers, tools, timeout_s
        self._session: _Session | None = None

    @classmethod
    def served(cls, options: JsonObject) -> list[JsonObject]:
        """See `ServedTools.served`."""
        servers = options.get("servers") or {}

        async def ask() -> list[JsonObject]:
            async with contextlib.AsyncExitStack() as stack:
                clients = await _connected(servers, stack)
                found, _ = await _tools_of(clients, options.get("tools"))
                return found

        # Its own loop, in its own thread: who asks may be in one already.
        with ThreadPoolExecutor(1) as thread:
            try:
                return thread.submit(asyncio.run, asyncio.wait_for(ask(), ANSWER_S)).result()
            except EnvironmentLoadError:
                raise
            except TimeoutError:
                raise EnvironmentLoadError(
                    f"no answer of an MCP server within {ANSWER_S:g} s"
                ) from None
            except Exception as error:
                why = error_tail(_root(error), 1000)
                raise EnvironmentLoadError(f"{UNLISTED}: {why}") from error

    async def call_served(self, name: str, arguments: Mapping[str, object]) -> object:
        """See `ServedTools.call_served`."""
        if self._session is None:
            self._session = _Session(self._servers, self._wanted, self._timeout_s)
        return await self._session.call(name, dict(arguments))

    async def close(self) -> None:
        """End the sessions, and with them the servers over stdio."""
        if self._session is not None:
            await self._session.close()


class _Session:
    """Connections to servers, opened and closed by one task, as anyio demands."""

    _few = asyncio.Semaphore(AT_ONCE)

    def __init__(self, servers: Servers, wanted: Sequence[str] | None, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._over = asyncio.Event()
        self._ready: asyncio.Future[Clients] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(servers, wanted))

    async def _hold(self, servers: Servers, wanted: Sequence[str] | None) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with self._few:
                    clients = await _connected(servers, stack)
                    _, owners = await _tools_of(clients, wanted)
                self._ready.set_result(owners)
                await self._over.wait()
        except Exception as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            # A server that has ended by itself: the next call says so, if there is one.
            logger.info("a session with an MCP server ended", exc_info=error)

    async def call(self, name: str, arguments: JsonObject) -> object:
        try:
            # Shielded: a call that is given up must not take the session with it.
            owners = await asyncio.shield(self._ready)
        except Exception as error:
            raise EnvironmentFailed(f"no MCP server: {error_tail(_root(error), 500)}") from error
        if name not in owners:
            raise UnknownTool(list(owners))
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await owners[name].call_tool(name, arguments)
        except TimeoutError:
            raise ToolError(f"{name}: no answer within {self._timeout_s:g} s") from None
        except mcp.MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise EnvironmentFailed(f"the MCP server has ended: {error.message}") from error
            raise ToolError(error.message) from error
        text = "\n".join(_as_text(block) for block in result.content)
        if result.is_error:
            raise ToolError(text)
        return text or result.structured_content

    async def close(self) -> None:
        self._over.set()
        await self._task


async def _connected(servers: Servers, stack: contextlib.AsyncExitStack) -> dict[str, mcp.Client]:
    found = {}
    for name, server in servers.items():
        _check(name, server)
        if "command" in server:
            # With the mark of this process, by which what it leaves behind is found.
            mark = {MARKER: os.environ[MARKER]} if MARKER in os.environ else {}
            target: Any = mcp.StdioServerParameters(
                command=str(server["command"]),
                args=[str(item) for item in server.get("args", ())],
                env={**mark, **_expanded(name, server.get("env", {}))},
                cwd=server.get("cwd"),
            )
        else:
            headers = _expanded(name, server.get("headers", {}))
            client_of_http = httpx2.AsyncClient(headers=headers, timeout=ANSWER_S)
            http = await stack.enter_async_context(client_of_http)
            target = streamable_http_client(str(server["url"]), http_client=http)
        client = mcp.Client(target, read_timeout_seconds=ANSWER_S)
        found[name] = await stack.enter_async_context(client)
    return found


async def _tools_of(
    clients: Mapping[str, mcp.Client], wanted: Sequence[str] | None
) -> tuple[list[JsonObject], dict[str, mcp.Client]]:
    """The schemas of the wanted tools, and which client calls which."""
    schemas: dict[str, JsonObject] = {}
    owners: dict[str, mcp.Client] = {}
    for server, client in clients.items():
        for tool in await _pages(client.list_tools):
            if wanted is not None and tool.name not in wanted:
                continue
            if tool.name in owners:
                raise EnvironmentLoadError(
                    f"two MCP servers have a tool {tool.name}, the second one is {server}: leave "
                    "one out with the option `tools`"
                )
            owners[tool.name] = client
            function = {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
            }
            schemas[tool.name] = {"type": "function", "function": function}
    missing = [name for name in wanted or () if name not in owners]
    if missing:
        raise EnvironmentLoadError(f"no MCP server has the tools {', '.join(missing)}")
    return list(schemas.values()), owners


async def _pages(ask: Callable[..., Awaitable[Any]]) -> list[Any]:
    found: list[Any] = []
    cursor = None
    while True:
        page = await ask(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return found


def _check(name: str, server: JsonObject) -> None:
    unknown = sorted(set(server) - KEYS)
    if unknown:
        raise EnvironmentLoadError(f"MCP server {name}: unknown keys {', '.join(unknown)}")
    if ("command" in server) == ("url" in server):
        raise EnvironmentLoadError(f"MCP server {name} needs `command` (stdio) or `url` (HTTP)")
    for values in (server.get("env", {}), server.get("headers", {})):
        _expanded(name, values)


def _expanded(server: str, values: Mapping[str, object]) -> dict[str, str]:
    try:
        return {
            name: string.Template(str(value)).substitute(os.environ)
            for name, value in values.items()
        }
    except KeyError as error:
        raise EnvironmentLoadError(
            f"MCP server {server}: {error.args[0]} is not set, or not in environments.secrets"
        ) from None


def _as_text(block: Any) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource" and hasattr(block.resource, "text"):
        return str(block.resource.text)
    return json.dumps({"type": block.type, "note": "left out: not text"})


def _root(error: BaseException) -> BaseException:
    """The first error in the groups that anyio's tasks raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
