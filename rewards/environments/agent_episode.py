"""One episode of an agent that owns its loop: its requests are the turns.

The agent runs in a process of environments and asks the model at `ChatServer`. A request waits here
until the rollout actor asks for the next turn; the reply that the engine samples is the answer to
it. Requests that come side by side are answered one after another, each a turn of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cohort.actors.plain import JsonObject
from cohort.actors.records import Prompt
from cohort.actors.text import completion_text
from cohort.actors.turns import EpisodeEnd, FinishReason, NextTurn, StopReason
from cohort.rewards.environments.base import Message, ToolCall, readable
from cohort.rewards.environments.calls import tool_calls
from cohort.rewards.environments.chat import MODEL, ApiError, ChatReply, ChatRequest
from cohort.rewards.environments.chat_server import ChatServer
from cohort.rewards.environments.episode import (
    Failed,
    Hosted,
    Language,
    Limits,
    assistant_message,
    ids_array,
)
from cohort.rewards.environments.histories import Continued, Histories
from cohort.rewards.environments.process import CallFailed, HostProcess, ProcessLost
from cohort.rewards.rendering import RenderError

STEP_KEY = "environments.step_timeout_s"


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request that waits for its reply."""

    request: ChatRequest
    messages: list[Message]
    tools: list[JsonObject]
    answer: asyncio.Future[ChatReply]

    def refuse(self, error: ApiError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def reply(self, reply: ChatReply) -> None:
        if not self.answer.done():
            self.answer.set_result(reply)


class AgentEpisode(Hosted):
    """One episode of an agent. See `Hosted` for the arguments that are not here.

    Args:
        languages: How conversations with these tools are read and written.
        server: Where the agent asks.
        message_chars: Longest message; the rest is cut.
    """

    def __init__(
        self,
        name: str,
        prompt: Prompt,
        process: HostProcess,
        limits: Limits,
        languages: Callable[[Sequence[JsonObject]], Language],
        server: ChatServer,
        message_chars: int,
    ) -> None:
        super().__init__(name, prompt, process, limits)
        self._metrics["lost_replies"] = 0.0
        self._languages = languages
        self._server = server
        self._message_chars = message_chars
        self._histories = Histories(self._first, prompt.token_ids)
        self._waiting: deque[_Asked] = deque()
        self._news = asyncio.Event()
        # The request that the engine is answering.
        self._open: tuple[_Asked, Language, Continued] | None = None
        self._key = ""
        self._has_ended = False
        self._run: asyncio.Task[JsonObject] | None = None
        # The limit for which the last request was refused, and what cut the last reply.
        self._limit: StopReason | None = None
        self._cut: StopReason | None = None

    async def begin(self, seed: int) -> NextTurn | EpisodeEnd:
        """Start the agent; what its first request continues."""
        self._key = self._server.issue(self)
        offered = {
            "row": self._row,
            "seed": seed,
            "base_url": self._server.base_url,
            "api_key": self._key,
            "model": MODEL,
        }
        # It lasts as long as its requests do.
        call = self.process.call(self.key, "run", offered, None)
        self._run = asyncio.create_task(call)
        self._run.add_done_callback(lambda _: self._news.set())
        return await self._next()

    async def step(
        self, token_ids: np.ndarray, finish_reason: FinishReason, logprobs: np.ndarray
    ) -> NextTurn | EpisodeEnd:
        """Answer the open request with the model's reply; what the next one continues."""
        assert self._open is not None, "a turn answers a request"
        asked, language, found = self._open
        self._open = None
        sampled = [int(token) for token in token_ids]
        text = completion_text(language.tokenizer, sampled, language.stop_ids)
        content, calls = self._read(asked, language, text)
        full = len(found.context) + len(sampled) >= self._limits.max_length
        own = asked.request.longest is not None and len(sampled) >= asked.request.longest
        self._cut = None
        if finish_reason == "length" and not own:
            self._cut = "context" if full else "length"
        message = assistant_message(content, content, calls)
        self._histories.add(asked.messages, asked.tools, found, sampled, message)
        self._said += [*_given(found.new), message]
        self._metrics["forks"] += found.fork
        self._metrics["inexact"] += found.inexact
        self._metrics["tool_calls"] += len(calls)
        reply = ChatReply(
            id=self._completion_id(len(self._rewards)),
            content=content,
            calls=calls,
            finish_reason="tool_calls" if calls and finish_reason == "stop" else finish_reason,
            prompt_tokens=len(found.context),
            tokens=len(sampled),
            logprobs=_by_token(language, sampled, logprobs) if asked.request.logprobs else None,
        )
        self._rewards.append(None)
        if self._metrics["tool_calls"] > self._limits.max_tool_calls:
            asked.refuse(self._over_tool_calls())
        else:
            asked.reply(reply)
        return await self._next()

    async def ask(self, request: ChatRequest, messages: list[Message]) -> ChatReply:
        """See `Session.ask`."""
        if self._has_ended:
            # Its key was read before the end, and its body came after it.
            raise _ended_key()
        answer: asyncio.Future[ChatReply] = asyncio.get_running_loop().create_future()
        asked = _Asked(request, messages, request.schemas, answer)
        self._waiting.append(asked)
        self._news.set()
        try:
            return await asked.answer
        except asyncio.CancelledError:
            if asked in self._waiting:
                self._waiting.remove(asked)
            else:
                # It is sampled all the same, and is a turn that the agent never saw.
                self._metrics["lost_replies"] += 1
            raise

    def end(self) -> None:
        """Take the key back; requests that wait are refused."""
        self._has_ended = True
        self._server.revoke(self._key)
        for asked in (*self._waiting, *(self._open or ())[:1]):
            asked.refuse(_ended_key())
        self._waiting.clear()
        if self._run is not None:
            self._run.cancel()

    async def _next(self) -> NextTurn | EpisodeEnd:
        """What the agent's next request continues, or the end of its loop."""
        until = time.monotonic() + self._limits.step_timeout_s
        try:
            while (asked := await self._request(until)) is not None:
                try:
                    return self._turn(asked)
                except ApiError as refusal:
                    asked.refuse(refusal)
            return await self._ended()
        except Failed as failed:
            return self._failed(failed)

    async def _request(self, until: float) -> _Asked | None:
        """The next request; None: the agent's loop has ended."""
        assert self._run is not None, "begin comes first"
        while not self._run.done():
            if self._waiting:
                return self._waiting.popleft()
            self._news.clear()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await self._news.wait()
            except TimeoutError:
                self.hangs = True
                raise Failed(
                    "data",
                    "step",
                    f"the agent neither asked the model nor ended within "
                    f"{self._limits.step_timeout_s:.3g} s ({STEP_KEY})",
                ) from None
        return None

    def _turn(self, asked: _Asked) -> NextTurn:
        """The turn that answers a request.

        Raises:
            ApiError: A limit, or messages that the chat template refuses.
        """
        limits = self._limits
        if self._metrics["tool_calls"] > limits.max_tool_calls:
            raise self._over_tool_calls()
        if len(self._rewards) >= limits.max_turns:
            raise self._over("turns", f"environments.max_turns={limits.max_turns} replies")
        if time.monotonic() > self._deadline:
            key = f"environments.episode_timeout_s={limits.episode_timeout_s:g}"
            raise self._over("time", f"{key} seconds")
        try:
            language = self._languages(asked.tools)
            found = self._histories.find(
                asked.messages,
                asked.tools,
                language.continuation,
                lambda messages: self._shown(messages, language),
            )
        except RenderError as error:
            raise ApiError(str(error), param="messages") from error
        if len(found.context) >= limits.max_length:
            self._limit = "context"
            raise ApiError(
                f"the conversation has {len(found.context)} tokens, and model.max_length is "
                f"{limits.max_length}",
                code="context_length_exceeded",
                param="messages",
            )
        self._limit = None
        self._open = asked, language, found
        inserted = ids_array(found.inserted)
        request = asked.request
        return NextTurn(found.parent, found.kept, inserted, request.longest, request.stops)

    def _over(self, reason: StopReason, bound: str) -> ApiError:
        self._limit = reason
        return ApiError(f"the episode has used up its {bound}", code=reason)

    def _over_tool_calls(self) -> ApiError:
        bound = f"environments.max_tool_calls={self._limits.max_tool_calls} tool calls"
        return self._over("tool_calls", bound)

    def _read(self, asked: _Asked, language: Language, text: str) -> tuple[str, list[ToolCall]]:
        """The words and the calls of a reply."""
        stops = [text.find(stop) for stop in asked.request.stops]
        text = text[: min((at for at in stops if at >= 0), default=None)]
        if not asked.tools or asked.request.tool_choice == "none":
            return text, []
        content, found = language.parser(text)
        broken = sum(error is not None for _, _, error in found)
        self._metrics["tool_errors"] += broken
        # What is broken has no place among OpenAI's calls: the agent gets all of it as text.
        if broken or not found:
            return text, []
        return content, tool_calls(found, int(self._metrics["tool_calls"]))

    def _shown(self, messages: Sequence[Message], language: Language) -> list[Message]:
        """Messages as the model may read them: those of others cannot speak as the model."""
        shown = []
        for message in messages:
            if message["role"] != "assistant":
                content, cut = readable(message["content"], self._message_chars)
                content, broken = language.as_words(content)
                self._metrics["cut_messages"] += cut
                self._metrics["control_tokens"] += broken
                message = {**message, "content": content}
            shown.append(message)
        return shown

    async def _ended(self) -> EpisodeEnd:
        """What the agent's loop returned, and the environment's last word."""
        assert self._run is not None, "begin comes first"
        if self._run.cancelled():
            raise Failed("infra", "step", "the episode was forgotten")
        # From here on nothing of it is sampled.
        self.end()
        try:
            outcome = self._run.result()
        except CallFailed as error:
            # At a limit most agents end with the error that their last request got.
            if self._limit is None:
                raise Failed("data", "step", str(error)) from None
            outcome = {}
        except ProcessLost as error:
            raise Failed("infra", "step", str(error)) from None
        if not self._rewards and self._limit is None:
            raise Failed("data", "step", "the agent ended without having asked the model anything")
        limit_s = self._limits.step_timeout_s
        closed = await self._answer("close", {"score": True}, "step", limit_s, STEP_KEY)
        self._reward(outcome, closed["reward"])
        return EpisodeEnd(
            self._limit or self._cut or "done",
            tuple(self._rewards),
            tuple(self._said),
            self._metrics,
            closed["state"],
        )

    def _reward(self, outcome: JsonObject, last_word: float | None) -> None:
        """Give the turns their rewards; one for the whole episode counts to the last turn."""
        turns = {self._completion_id(turn): turn for turn in range(len(self._rewards))}
        for completion, value in outcome.get("rewards", {}).items():
            if completion not in turns:
                message = f"run returned a reward for {completion!r}, which is not one of its turns"
                raise Failed("data", "step", message)
            self._rewards[turns[completion]] = value
        whole = outcome.get("reward")
        if whole is None and "rewards" not in outcome:
            whole = last_word
        if whole is not None and self._rewards:
            self._rewards[-1] = whole

    def _completion_id(self, turn: int) -> str:
        return f"chatcmpl-{self.name}/{turn}"


def _ended_key() -> ApiError:
    return ApiError("the episode of this key has ended", 401, "invalid_api_key")


def _given(messages: Sequence[Message]) -> list[Message]:
    """Messages of a request for the record; a reply that the model did not make says so."""
    return [
        {**message, "given": True} if message["role"] == "assistant" else message
        for message in messages
    ]


def _by_token(
    language: Language, sampled: Sequence[int], logprobs: np.ndarray
) -> list[tuple[str, float]]:
    texts = [language.tokenizer.decode([token]) for token in sampled]
    return list(zip(texts, map(float, logprobs), strict=True))
