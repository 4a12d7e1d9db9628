"""Tools of real MCP servers, each in a process of its own, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from episode_table import call, results

from cohort.rewards.config import TaskConfig
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.specs import find_tools
from tests.serving import serving

pytestmark = pytest.mark.slow

SERVER = Path(__file__).parent / "mcp_server.py"
# An option that Python ignores tells these servers from those of tests beside this one.
STDIO = {"command": sys.executable, "args": ["-X", f"test={uuid.uuid4().hex}", str(SERVER)]}


def task(**options: Any) -> TaskConfig:
    return TaskConfig(environment="mcp", environment_options=options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(sys.executable, SERVER) as address:
        yield f"{address}/mcp"


def servers_left() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][1:] == STDIO["args"]
    ]


def test_the_schemas_are_the_servers_own() -> None:
    add, *others = find_tools(task(servers={"sums": STDIO}))
    assert add["function"]["name"] == "add"
    assert add["function"]["description"] == "Add two numbers."
    assert set(add["function"]["parameters"]["properties"]) == {"a", "b"}
    assert [tool["function"]["name"] for tool in others] == ["note", "fail", "hang", "leave"]
    (only,) = find_tools(task(servers={"sums": STDIO}, tools=["note"]))
    assert only["function"]["name"] == "note"
    assert servers_left() == []


WRONG = {
    "needs `command`": {"servers": {"sums": {}}},
    "unknown keys comand": {"servers": {"sums": {"comand": "x", "command": "y"}}},
    "no_such_program": {"servers": {"sums": {"command": "no_such_program"}}},
    "have the tools|has the tools fly": {"servers": {"sums": STDIO}, "tools": ["fly"]},
    "two MCP servers have a tool add": {"servers": {"one": STDIO, "two": STDIO}},
    "NO_SUCH_KEY is not set": {"servers": {"sums": {**STDIO, "env": {"K": "${NO_SUCH_KEY}"}}}},
    "cannot be listed": {"servers": {"sums": {"url": "http://127.0.0.1:9/mcp"}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_server_is_an_error_before_anything_starts(message: str) -> None:
    with pytest.raises(EnvironmentLoadError, match=message):
        find_tools(task(**WRONG[message]))


@pytest.mark.parametrize("way", ["stdio", "http"])
def test_tools_of_a_server(at_table: Any, url: str, way: str) -> None:
    server = STDIO if way == "stdio" else {"url": url, "headers": {"X-Who": "${PATH}"}}

    async def body(table: Any) -> None:
        made = await table.play(
            [
                call("add", a=2, b=3),
                call("add", a="two") + call("fail") + call("fly"),
                call("hang"),
                call("note", text="x") + call("note", text="y"),
                "Done.",
            ],
            max_tokens=400,
        )
        assert made.end.stop_reason == "answered"
        added, wrong, failed, unknown, hung, *noted = results(made)
        assert added == "5"
        assert wrong.startswith("error: ") and "two" in wrong
        assert "out of order" in failed and "Traceback" not in failed
        assert "no tool 'fly'; the tools are add, fail, hang, leave, note" in unknown
        assert hung == "error: hang: no answer within 1 s"
        assert noted == ["1 notes", "2 notes"]
        assert made.end.metrics["tool_errors"] == 4

    at_table("mcp", body, options={"servers": {"sums": server}, "timeout_s": 1}, step_timeout_s=30)
    assert servers_left() == []


def test_each_episode_has_a_server_of_its_own(at_table: Any) -> None:
    async def body(table: Any) -> None:
        said = [call("note", text="x"), call("note", text="y"), "Done."]
        episodes = await asyncio.gather(
            *(table.play(said, index, max_tokens=400) for index in range(4))
        )
        for made in episodes:
            assert results(made) == ["1 notes", "2 notes"]
        # They end with their episodes, not with the process.
        assert servers_left() == []

    at_table("mcp", body, options={"servers": {"sums": STDIO}}, step_timeout_s=60)


def test_a_server_that_dies_fails_its_episode(at_table: Any) -> None:
    async def body(table: Any) -> None:
        said = [call("leave"), "Done."]
        made, other = await asyncio.gather(
            table.play(said, max_tokens=400),
            table.play([call("add", a=1, b=1), "Done."], 1, max_tokens=400),
        )
        assert made.end.failure is not None
        assert "the MCP server has ended" in made.end.failure.message
        assert results(other) == ["2"]

    at_table("mcp", body, options={"servers": {"sums": STDIO}}, step_timeout_s=60)
    assert servers_left() == []


def test_a_class_adds_its_own_tools_and_reward(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play(
            [call("add", a=1, b=1) + call("answer", number=2), "Done."], max_tokens=400, right=2
        )
        assert results(made) == ["2", "noted"]
        assert made.end.reward == 1.0

    options = {"servers": {"sums": STDIO}}
    path = f"{Path(__file__).parent / 'hostile_environments.py'}:Sums"
    names = [
        tool["function"]["name"]
        for tool in find_tools(TaskConfig(environment=path, environment_options=options))
    ]
    assert names == ["answer", "add", "note", "fail", "hang", "leave"]
    at_table("Sums", body, options=options, step_timeout_s=60)
