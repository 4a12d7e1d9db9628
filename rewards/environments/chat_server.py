"""The endpoint at which agents ask the model: OpenAI's chat completions, on loopback.

An agent runs in a process of environments; this server is in their worker, which has the tokenizer
and the conversations. Every episode has a key of its own, which says whose request it is.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web

from cohort.actors.plain import JsonObject
from cohort.rewards.environments.base import Message
from cohort.rewards.environments.chat import ApiError, ChatReply, ChatRequest, models, parse

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_BODY = 64 << 20
SHUTDOWN_S = 1.0


class Session(Protocol):
    """An episode, as the server asks it."""

    async def ask(self, request: ChatRequest, messages: list[Message]) -> ChatReply:
        """The model's reply.

        Raises:
            ApiError: There is no reply to this request.
            asyncio.CancelledError: The client has gone.
        """
        ...


class ChatServer:
    """Answers requests with the replies of the episode whose key they have.

    Args:
        temperature: Of the rollouts; requests that name another one are refused.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        # By the first half of the key; the second half is the secret.
        self._sessions: dict[str, tuple[str, Session]] = {}
        # Without an access log: nothing here may write keys anywhere. A client that goes away
        # cancels its request, or nobody would know.
        self._runner = web.AppRunner(
            self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
        )
        self.base_url = ""

    async def start(self) -> None:
        """Listen on a port that is free. `base_url` is where."""
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        self.base_url = f"http://{LOOPBACK}:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()

    def issue(self, session: Session) -> str:
        """A new key, which is good until `revoke`."""
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        self._sessions[name] = (secret, session)
        return f"{name}.{secret}"

    def revoke(self, key: str) -> None:
        """Take a key back."""
        self._sessions.pop(key.partition(".")[0], None)

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors_as_json])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        return app

    def _session(self, request: web.Request) -> Session:
        """Whose request it is.

        Raises:
            ApiError: It has no key of a running episode.
        """
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        name, _, secret = key.strip().partition(".")
        known, session = self._sessions.get(name, ("", None))
        right = hmac.compare_digest(known.encode(), secret.encode())
        if kind.lower() != "bearer" or session is None or not right:
            message = "this is not the key of a running episode: use the api_key that `run` got"
            raise ApiError(message, 401, "invalid_api_key")
        return session

    async def _models(self, request: web.Request) -> web.Response:
        self._session(request)
        return web.json_response(models())

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        asked, messages = parse(await request.read(), self._temperature)
        reply = await session.ask(asked, messages)
        if not asked.stream:
            return web.json_response(reply.body())
        response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        options = asked.stream_options
        for chunk in reply.chunks(bool(options and options.include_usage)):
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _refused(error)
    except web.HTTPException as error:
        where = f"{request.method} {request.path}"
        return _refused(ApiError(f"{where}: {error.reason}", error.status))
    except ConnectionError:
        raise  # the client has gone: there is nobody to tell
    except Exception as error:
        logger.exception("the endpoint for agents has failed")
        return _refused(ApiError(f"{type(error).__name__}: {error}", 500))


def _refused(error: ApiError) -> web.Response:
    body: JsonObject = error.body
    return web.json_response(body, status=error.status)
