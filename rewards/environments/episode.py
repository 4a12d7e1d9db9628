"""One episode: the conversation, its tokens, its limits, and why it ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cohort.actors.plain import JsonObject
from cohort.actors.records import Prompt
from cohort.actors.text import completion_text
from cohort.actors.turns import (
    EpisodeEnd,
    EpisodeFailure,
    FailureKind,
    FinishReason,
    NextTurn,
    Stage,
    StopReason,
)
from cohort.rewards.continuation import Continuation, shared_prefix
from cohort.rewards.environments.base import Message, ToolCall
from cohort.rewards.environments.calls import Parser, tool_calls
from cohort.rewards.environments.process import CallFailed, HostProcess, ProcessLost
from cohort.rewards.rendering import RenderError
from cohort.rewards.results import checked_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_numbers = itertools.count()
# What is counted here, of every episode.
COUNTED = ("tool_calls", "tool_errors", "cut_messages", "control_tokens", "forks", "inexact")
# Metrics of episodes that an environment's own must not replace.
TAKEN = frozenset({*COUNTED, "lost_replies", "turns", "turns_total"})
TAKEN_FOLDERS = ("stop/", "failed/")


@dataclass(frozen=True)
class Limits:
    """Bounds of an episode.

    Attributes:
        max_turns: Replies of the model.
        max_tool_calls: Calls of tools, over all turns.
        step_timeout_s: Of one answer of the environment.
        episode_timeout_s: From the reset on; no turn begins after it.
        max_length: Tokens of the longest sequence.
    """

    max_turns: int
    max_tool_calls: int
    step_timeout_s: float
    episode_timeout_s: float
    max_length: int


@dataclass(frozen=True)
class Language:
    """How a model's conversations are read and written.

    Attributes:
        tokenizer: The model's.
        continuation: Puts new messages behind a reply.
        parser: Finds tool calls in a reply.
        stop_ids: What the engine stops at.
    """

    tokenizer: PreTrainedTokenizerBase
    continuation: Continuation
    parser: Parser
    stop_ids: Sequence[int]

    def as_words(self, text: str) -> tuple[str, int]:
        """A text without control tokens, and how many it had: none but the model may end a turn.

        Example:
            "bye<|im_end|>" becomes "bye< |im_end|>".
        """
        found = 0
        for token in self._control_tokens:
            count = text.count(token)
            if count:
                found += count
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text, found

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Those by which the template and the engine part the turns. Gemma's tokenizer, for one,
        adds others: blank lines, and tags of HTML."""
        template = str(self.tokenizer.chat_template)
        return [
            str(token)
            for number, token in self.tokenizer.added_tokens_decoder.items()
            # A token of one letter is no more than that letter.
            if len(str(token)) > 1
            and str(token).strip()
            # Some templates put a <|token|> together from parts.
            and (token.special or str(token) in template or "|" in str(token))
        ]


class Failed(Exception):
    """The episode cannot go on, and has no reward."""

    def __init__(self, kind: FailureKind, stage: Stage, message: str) -> None:
        super().__init__(message)
        self.failure = EpisodeFailure(kind, stage, message)


class Hosted:
    """An episode whose environment lives in a process.

    Args:
        name: The episode's id.
        prompt: What it begins with.
        process: Where its environment lives.
        limits: Its bounds.

    Attributes:
        key: Its name in its process: one that was begun again has another, so that an answer to
            the one before never reaches it.
        hangs: Whether the environment did not answer in time: its process has to go.
    """

    def __init__(self, name: str, prompt: Prompt, process: HostProcess, limits: Limits) -> None:
        self.name = name
        self.key = f"{name}#{next(_numbers)}"
        self.process = process
        self.hangs = False
        self._prompt = prompt
        self._limits = limits
        self._deadline = time.monotonic() + limits.episode_timeout_s
        content = prompt.content
        asked = [{"role": "user", "content": content}] if isinstance(content, str) else content
        self._first: list[Message] = [dict(message) for message in asked]
        # What was said, by the environment too, and what the environment gave for each reply.
        self._said: list[Message] = []
        self._rewards: list[float | None] = []
        self._metrics: dict[str, float] = dict.fromkeys(COUNTED, 0.0)

    def end(self) -> None:
        """Stop what the episode has going on here; its environment is closed separately."""

    @property
    def _row(self) -> JsonObject:
        """The row as environments get it."""
        return {"prompt": self._prompt.content, **self._prompt.columns}

    async def _answer(
        self, what: str, arguments: Mapping[str, object], stage: Stage, limit_s: float, key: str
    ) -> JsonObject:
        """What the environment answers within a limit, which a key of the config names."""
        try:
            return await self.process.call(self.key, what, arguments, limit_s)
        except TimeoutError:
            self.hangs = True
            message = f"{what} gave no answer within {limit_s:.3g} s ({key})"
            raise Failed("data", stage, message) from None
        except CallFailed as error:
            raise Failed("data", stage, str(error)) from None
        except ProcessLost as error:
            raise Failed("infra", stage, str(error)) from None

    def _failed(self, failed: Failed) -> EpisodeEnd:
        return EpisodeEnd(
            "failed",
            (None,) * len(self._rewards),
            tuple(self._said),
            self._metrics,
            failure=failed.failure,
        )


class Episode(Hosted):
    """One episode of one prompt with an environment that answers the model."""

    def __init__(
        self, name: str, prompt: Prompt, process: HostProcess, language: Language, limits: Limits
    ) -> None:
        super().__init__(name, prompt, process, limits)
        self._language = language
        # The conversation as the template was last given it.
        self._conversation: list[Message] = list(self._first)
        self._context = list(prompt.token_ids)

    async def begin(self, seed: int) -> NextTurn | EpisodeEnd:
        """Reset the environment; what the first turn continues."""
        try:
            found = await self._call("reset", {"row": self._row, "seed": seed}, "reset")
            self._count(found)
            if not found["messages"]:
                return NextTurn(None, len(self._context), ids_array([]))
            self._said += found["messages"]
            self._conversation = _joined(self._first, found["messages"])
            whole = self._rendered()
            kept = shared_prefix(self._context, whole)
            self._context = whole
            if len(whole) >= self._limits.max_length:
                return await self._ended("context")
            return NextTurn(None, kept, ids_array(whole[kept:]))
        except Failed as failed:
            return self._failed(failed)

    async def step(
        self, token_ids: np.ndarray, finish_reason: FinishReason, _logprobs: np.ndarray
    ) -> NextTurn | EpisodeEnd:
        """Give the environment the model's reply to what `NextTurn` said."""
        try:
            return await self._step([int(token) for token in token_ids], finish_reason)
        except Failed as failed:
            return self._failed(failed)

    async def _step(self, sampled: list[int], finish_reason: FinishReason) -> NextTurn | EpisodeEnd:
        language, turn = self._language, len(self._rewards)
        text = completion_text(language.tokenizer, sampled, language.stop_ids)
        content, found = language.parser(text)
        calls = tool_calls(found, int(self._metrics["tool_calls"]))
        message = assistant_message(text, content, calls)
        self._said.append(message)
        self._rewards.append(None)
        self._metrics["tool_calls"] += len(calls)
        if self._metrics["tool_calls"] > self._limits.max_tool_calls:
            return await self._ended("tool_calls")
        reply = {
            "text": text,
            "tool_calls": calls,
            "content": content,
            "token_ids": sampled,
            "stop_reason": finish_reason,
        }
        step = await self._call("step", {"reply": reply}, "step")
        self._count(step)
        if step.get("failure") is not None:
            raise Failed("data", "step", str(step["failure"]))
        self._rewards[turn] = step["reward"]
        if finish_reason == "length":
            # Also where the environment ends it: `algorithm.mask_truncated` is about such replies.
            self._said += step["messages"] if step["done"] else []
            full = len(self._context) + len(sampled) >= self._limits.max_length
            return await self._ended("context" if full else "length")
        self._said += step["messages"]
        if step["done"]:
            return await self._ended("done" if step["messages"] or calls else "answered")
        if turn + 1 >= self._limits.max_turns:
            return await self._ended("turns")
        if time.monotonic() > self._deadline:
            return await self._ended("time")
        new = step["messages"] or [{"role": "user", "content": ""}]
        try:
            extension = language.continuation.extend(
                self._conversation, self._context, sampled, new, message
            )
        except RenderError as error:
            raise Failed("data", "template", str(error)) from error
        self._metrics["forks"] += extension.fork
        self._metrics["inexact"] += extension.inexact
        self._conversation = [dict(message) for message in extension.messages]
        self._context = extension.sequence(self._context, sampled)
        if len(self._context) >= self._limits.max_length:
            return await self._ended("context")
        return NextTurn(turn, extension.kept, ids_array(extension.token_ids))

    async def _ended(self, reason: StopReason) -> EpisodeEnd:
        """Ask the environment for its last word, and close it."""
        found = await self._call("close", {"score": True}, "step")
        if found["reward"] is not None and self._rewards:
            self._rewards[-1] = (self._rewards[-1] or 0.0) + found["reward"]
        return EpisodeEnd(
            reason, tuple(self._rewards), tuple(self._said), self._metrics, found["state"]
        )

    async def _call(self, what: str, arguments: Mapping[str, object], stage: Stage) -> JsonObject:
        # Also where the episode has less time left: it ends behind this answer, and keeps it.
        limit, key = self._limits.step_timeout_s, "environments.step_timeout_s"
        return await self._answer(what, {**arguments, "seconds": limit}, stage, limit, key)

    def _rendered(self) -> list[int]:
        try:
            return self._language.continuation.prompt_ids(self._conversation)
        except RenderError as error:
            raise Failed("data", "template", str(error)) from error

    def _count(self, found: JsonObject) -> None:
        for message in found["messages"]:
            message["content"], broken = self._language.as_words(message["content"])
            self._metrics["control_tokens"] += broken
        self._metrics["cut_messages"] += found["cut"]
        own = {name: value for name, value in self._metrics.items() if name not in TAKEN}
        for name, value in found.get("metrics", {}).items():
            if name == "tool_errors":
                # Every turn counts; of the environment's own numbers the last.
                self._metrics[name] += value
                continue
            if name in TAKEN or name.startswith(TAKEN_FOLDERS):
                name = f"environment/{name}"
            try:
                own[checked_name(name, own, "Step.metrics")] = value
            except ValueError as error:
                raise Failed("data", "step", str(error)) from None
        self._metrics.update(own)


def ids_array(token_ids: Sequence[int]) -> np.ndarray:
    """[T] int64."""
    return np.asarray(token_ids, dtype=np.int64)


def _joined(first: list[Message], new: list[Message]) -> list[Message]:
    """A row's prompt with what the environment says at first.

    A text joins the question: templates of many models refuse two of them in a row.
    """
    last = first[-1] if first else {"role": ""}
    if len(new) == 1 and new[0]["role"] == "user" and last["role"] == "user":
        return [*first[:-1], {**last, "content": f"{last['content']}\n\n{new[0]['content']}"}]
    return [*first, *new]


def assistant_message(text: str, content: str, calls: Sequence[ToolCall]) -> Message:
    """The model's reply as a message, with its calls in the form that templates read."""
    if not calls:
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in calls
        ],
    }
