"""Environments of the real openenv package, on its own server and in their process.

It needs mcp<2 and vLLM mcp>=2, so that it is in no virtual environment that trains. The server's
tests want one that has it: OPENENV_PYTHON=VENV/bin/python. In-process tests run where pytest itself
has it. What a server does that ends or is full is played by a small one here, without the package.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.serving import serving

pytestmark = pytest.mark.slow

ECHO = Path(__file__).parent / "openenv_echo.py"
PYTHON = os.environ.get("OPENENV_PYTHON")
HAS_SERVER = pytest.mark.skipif(
    PYTHON is None, reason="OPENENV_PYTHON names no Python with openenv"
)
HAS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("openenv") is None,
    reason="openenv needs mcp<2, vLLM mcp>=2: it is not installed here",
)
SESSIONS = 4


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(str(PYTHON), ECHO, str(SESSIONS)) as address:
        yield address


@pytest.fixture(
    params=[pytest.param("server", marks=HAS_SERVER), pytest.param("here", marks=HAS_PACKAGE)]
)
def side(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "server":
        return {"url": request.getfixturevalue("url")}
    return {"environment": f"{ECHO}:EchoEnvironment", "action": f"{ECHO}:EchoAction"}


def test_an_episode_in_text(at_table: Any, side: dict[str, Any]) -> None:
    async def body(table: Any) -> None:
        made = await table.play(["hi", "bye"], name="Ann")
        assert made.end.failure is None, made.end.failure
        assert made.end.stop_reason == "done"
        assert made.end.rewards == (1.0, 2.0)
        assert [m["content"] for m in made.end.messages] == [
            "Hello Ann, seed 17.", "hi", "hi", "bye", "bye",
        ]  # fmt: skip

    options = {**side, "text": "message", "show": "echoed", "columns": ["name"]}
    at_table("openenv", body, options=options, step_timeout_s=30)


def test_actions_and_observations_as_json(at_table: Any, side: dict[str, Any]) -> None:
    async def body(table: Any) -> None:
        said = ["no JSON", "[1]", '{"text": "x"}', '{"message": "hi", "times": 2}']
        made = await table.play([*said, '{"message": "bye"}'], max_tokens=200)
        assert made.end.failure is None, made.end.failure
        _, *answers = [m["content"] for m in made.end.messages if m["role"] == "user"]
        assert answers[0].startswith("error: the action is not valid JSON")
        assert answers[1] == "error: the action must be a JSON object"
        assert answers[2].startswith("error: ") and "message: Field required" in answers[2]
        assert answers[3] == '{"echoed": "hi hi", "length": 5}'
        assert made.end.rewards == (None, None, None, 1.0, 2.0)
        assert made.end.metrics["tool_errors"] == 3

    at_table("openenv", body, options=side, step_timeout_s=30)


def test_one_that_fails_and_one_that_hangs_cost_their_own_episodes(
    at_table: Any, side: dict[str, Any]
) -> None:
    async def body(table: Any) -> None:
        failed, hung, good = await asyncio.gather(
            table.play(["fail"]), table.play(["hang"], 1), table.play(["bye"], 2)
        )
        assert "out of order" in failed.end.failure.message
        assert "no answer within" in hung.end.failure.message
        assert good.end.reward == 1.0
        again = await table.play(["bye"])
        assert again.end.failure is None, again.end.failure

    options = {**side, "text": "message", "show": "echoed"}
    at_table("openenv", body, options=options, step_timeout_s=15)


@HAS_SERVER
def test_episodes_wait_for_a_free_session(at_table: Any, url: str) -> None:
    async def body(table: Any) -> None:
        made = await asyncio.gather(
            *(table.play(["hi", "bye"], index) for index in range(3 * SESSIONS))
        )
        assert [one.end.failure for one in made] == [None] * len(made)

    options = {"url": url, "text": "message", "show": "echoed"}
    at_table("openenv", body, options=options, step_timeout_s=60)


WRONG = {
    "needs `url`, or": {},
    "no file": {"environment": "nowhere.py:Env", "action": "nowhere.py:Action"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_an_error_before_anything_starts(tiny_model: Path, message: str) -> None:
    from episode_table import spec_of

    from cohort.rewards.environments.base import EnvironmentLoadError
    from cohort.rewards.environments.worker import try_environment

    with pytest.raises(EnvironmentLoadError, match=message):
        try_environment(spec_of(tiny_model, "openenv", options=WRONG[message]))


def served(handler: Callable[[web.WebSocketResponse], Awaitable[None]]) -> Any:
    """A context with the address of a small server that speaks so."""

    async def answer(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        await handler(response)
        return response

    class Context:
        async def __aenter__(self) -> str:
            app = web.Application()
            app.router.add_get("/ws", answer)
            self.runner = web.AppRunner(app)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            assert site._server is not None
            return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

        async def __aexit__(self, *_: object) -> None:
            await self.runner.cleanup()

    return Context()


def test_a_server_that_ends_or_is_full() -> None:
    from cohort.rewards.environments.adapters.openenv import OpenEnv
    from cohort.rewards.environments.base import Reply

    async def ends(socket_: web.WebSocketResponse) -> None:
        await socket_.receive()
        await socket_.send_json({"type": "observation", "data": {"observation": {"said": "hi"}}})
        await socket_.receive()

    asked = 0

    async def full(socket_: web.WebSocketResponse) -> None:
        nonlocal asked
        asked += 1
        error = {"code": "CAPACITY_REACHED", "message": "4 of 4"}
        await socket_.send_json({"type": "error", "data": error})

    async def main() -> None:
        async with served(ends) as url:
            env = OpenEnv(url=url, text="message", show="said")
            assert await env.reset({"prompt": "x"}, 1) == "hi"
            with pytest.raises(ConnectionError, match="has ended the session"):
                await env.step(Reply("hello"))
            await env.close()
        async with served(full) as url:
            env = OpenEnv(url=url, text="message", wait_s=1)
            with pytest.raises(RuntimeError, match="CAPACITY_REACHED: 4 of 4"):
                await env.reset({"prompt": "x"}, 1)
            await env.close()
            assert asked > 1

    asyncio.run(main())
