"""Chat completions as OpenAI's API has them: what a request may ask, and replies as JSON.

What cannot be kept is refused, never ignored. A request that wanted another temperature, or text
between forced tokens, would be trained as if the model had said it by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cohort.actors.plain import JsonObject
from cohort.rewards.environments.base import Message, ToolCall

# What the endpoint calls the model.
MODEL = "policy"


class ApiError(Exception):
    """A request is refused, in OpenAI's words for errors.

    Args:
        message: Why.
        status: The HTTP status. Clients try again by themselves on 408, 409, 429 and 5xx.
        code: A word for programs.
        param: The part of the request that is wrong.
    """

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _only(*allowed: Any) -> AfterValidator:
    """One of these values."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError(f"only {' or '.join(map(repr, allowed))} is possible here")
        return value

    return AfterValidator(check)


def _joined_parts(content: Any) -> Any:
    """A content that is given in parts, as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of a message must be a text, not {kind!r}")
    return "\n".join(part["text"] for part in content)


class _Function(BaseModel):
    name: str
    arguments: str


class _Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: _Function


class _Message(BaseModel):
    # Clients send back all fields of a reply, most of them empty.
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined_parts)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[_Call] | None = None


class _ToolFunction(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    # Frameworks set it without being asked; calls are never forced into their schema.
    strict: bool | None = None


class _Tool(BaseModel):
    type: Literal["function"]
    function: _ToolFunction


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of a request. Fields without an effect on the reply are named at the end."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    tool_choice: Annotated[Any, _only("auto", "none")] = None
    parallel_tool_calls: Annotated[bool | None, _only(True)] = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _only(0)] = None
    temperature: float | None = None
    n: Annotated[int | None, _only(1)] = None
    top_p: Annotated[float | None, _only(1)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None
    response_format: Annotated[JsonObject | None, _only({"type": "text"})] = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def longest(self) -> int | None:
        """Its own bound on the tokens of the reply."""
        bounds = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(bounds, default=None)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def schemas(self) -> list[JsonObject]:
        """The tools as a chat template reads them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": tool.function.parameters or {"type": "object", "properties": {}},
                },
            }
            for tool in self.tools or ()
        ]


def parse(body: bytes, temperature: float) -> tuple[ChatRequest, list[Message]]:
    """A request and its messages as a chat template reads them.

    Args:
        body: JSON.
        temperature: That of the rollouts, `actors.temperature`.

    Raises:
        ApiError: It asks for something that is not there, or not possible.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    if request.model != MODEL:
        message = f"there is no model {request.model!r} here; its name is {MODEL!r}"
        raise ApiError(message, 404, "model_not_found", "model")
    if request.temperature not in (None, temperature):
        raise ApiError(
            f"temperature {request.temperature:g} is not that of the rollouts, "
            f"actors.temperature={temperature:g}: leave it out, or what is sampled could not be "
            "trained",
            param="temperature",
        )
    if len(request.stops) > 4 or not all(request.stops):
        raise ApiError("stop takes up to 4 texts, none of them empty", param="stop")
    messages = _as_messages(request.messages)
    if messages[-1]["role"] == "assistant":
        raise ApiError("the last message must not be the assistant's own", param="messages")
    return request, messages


def _refusal(error: ValidationError) -> ApiError:
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return ApiError(f"{where} is not supported here", code="unsupported_parameter", param=where)
    said = found["msg"].removeprefix("Value error, ")
    return ApiError(f"{where}: {said}" if where else said, param=where or None)


def _as_messages(given: Sequence[_Message]) -> list[Message]:
    called: dict[str, str] = {}
    messages: list[Message] = []
    for at, item in enumerate(given):
        unknown = [key for key, value in (item.model_extra or {}).items() if value]
        if unknown:
            raise ApiError(f"messages.{at}.{unknown[0]} is not supported here", param="messages")
        message: Message = {
            # Chat templates do not know OpenAI's later name of it.
            "role": "system" if item.role == "developer" else item.role,
            "content": item.content or "",
        }
        if item.tool_calls:
            message["tool_calls"] = [_as_call(call, at) for call in item.tool_calls]
            called |= {call.id: call.function.name for call in item.tool_calls}
        if item.role == "tool":
            identity = item.tool_call_id or ""
            # Some templates print the tool's name, which OpenAI's messages leave out.
            name = item.name or called.get(identity)
            message |= {"tool_call_id": identity} | ({"name": name} if name else {})
        elif item.name:
            message["name"] = item.name
        messages.append(message)
    return messages


def _as_call(call: _Call, at: int) -> JsonObject:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            f"messages.{at}.tool_calls: arguments must be a JSON object", param="messages"
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatReply:
    """A reply of the model.

    Attributes:
        id: Of the completion.
        content: Its text, without tool calls.
        calls: Of tools.
        finish_reason: stop, length, or tool_calls.
        prompt_tokens: That it answers.
        tokens: Sampled.
        logprobs: Token texts and their log-probs, where the request wants them.
    """

    id: str
    content: str
    calls: Sequence[ToolCall]
    finish_reason: str
    prompt_tokens: int
    tokens: int
    logprobs: Sequence[tuple[str, float]] | None = None

    def body(self) -> JsonObject:
        """The answer to a request without `stream`."""
        message = {"role": "assistant", **self._words(), "refusal": None}
        choice = _choice({"message": message}, self.finish_reason, self._logprobs())
        return self._object("chat.completion", [choice]) | {"usage": self._usage()}

    def chunks(self, usage: bool) -> Iterator[JsonObject]:
        """The answer to one with it. Engines give replies when they are whole: all of the text is
        one piece."""
        words = self._words()
        for index, call in enumerate(words.get("tool_calls", ())):
            call["index"] = index
        delta = {"delta": {"role": "assistant", **words}}
        kind = "chat.completion.chunk"
        yield self._object(kind, [_choice(delta, None, self._logprobs())])
        yield self._object(kind, [_choice({"delta": {}}, self.finish_reason)])
        if usage:
            yield self._object(kind, []) | {"usage": self._usage()}

    def _words(self) -> JsonObject:
        if not self.calls:
            return {"content": self.content}
        return {
            "content": self.content or None,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False),
                    },
                }
                for call in self.calls
            ],
        }

    def _logprobs(self) -> JsonObject | None:
        if self.logprobs is None:
            return None
        tokens = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in self.logprobs
        ]
        return {"content": tokens, "refusal": None}

    def _object(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        created = int(time.time())
        return {
            "id": self.id, "object": kind, "created": created, "model": MODEL, "choices": choices,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": total,
        }


def _choice(
    said: Mapping[str, object], finish_reason: str | None, logprobs: JsonObject | None = None
) -> JsonObject:
    return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}


def models() -> JsonObject:
    """The answer to /v1/models."""
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "cohort"}
    return {"object": "list", "data": [model]}
