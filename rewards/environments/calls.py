"""Tool calls in what a model wrote, by the model family's own form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cohort.actors.plain import JsonObject
from cohort.actors.text import completion_text
from cohort.rewards.continuation import shared_prefix
from cohort.rewards.environments.base import EnvironmentLoadError, ToolCall
from cohort.rewards.rendering import RenderError, TokenizerRenderer
from cohort.rewards.tool_messages import (
    QUESTION,
    TOOL,
    a_call,
    supports_tools,
    tools_as_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# text -> (what is left of it, [(name, arguments, error)])
Found = list[tuple[str, JsonObject, str | None]]
Parser = Callable[[str], tuple[str, Found]]

# The arguments of the call by which parsers are tried.
EXAMPLE: JsonObject = {"name": "x"}

# Without `\s*` beside `.*?` and before `\s*`: a reply of many spaces would take minutes.
HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LLAMA = re.compile(r"(?:<\|python_tag\|>\s*)?(\{.*)\Z", re.DOTALL)
MISTRAL = "[TOOL_CALLS]"
# What follows it from version 11 on; the id has nine letters.
NAMED = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\]\w{1,9})?(?:\[ARGS\])?\s*(?=\{)")


def hermes(text: str) -> tuple[str, Found]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen, Hermes, SmolLM."""
    found = [_call(match.strip()) for match in HERMES.findall(text)]
    return HERMES.sub("", text).strip() if found else text, found


def llama3_json(text: str) -> tuple[str, Found]:
    """`{"name": ..., "parameters": {...}}` as the whole reply: Llama 3.1 and later.

    Several are parted by semicolons. Another object with a name is an answer and no call.
    """
    match = LLAMA.match(text.lstrip())
    if match is None or not ('"parameters"' in match[1] or '"arguments"' in match[1]):
        return text, []
    left, found = match[1], []
    while left:
        try:
            call, end = JSON.raw_decode(left)
        except (ValueError, RecursionError) as error:
            found.append(_broken(error))
            break
        if not isinstance(call, dict) or "name" not in call or not ARGUMENTS & call.keys():
            return text, []
        found.append(_checked(call))
        left = left[end:].lstrip(" \t\r\n;")
    return "", found


def mistral(text: str) -> tuple[str, Found]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`."""
    said, *parts = text.split(MISTRAL)
    if not parts:
        return text, []
    found: Found = []
    for part in parts:
        named = NAMED.match(part)
        try:
            body = part[named.end() :] if named else part.lstrip()
            read, end = JSON.raw_decode(body)
        except (ValueError, RecursionError) as error:
            found.append(_broken(error))
            continue
        said += body[end:].rstrip()
        calls = read if isinstance(read, list) else [read]
        if named:
            calls = [{"name": named[1], "arguments": read}]
        found += [_checked(call) for call in calls]
    return said.strip(), found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


# NaN and Infinity, which Python reads, are no JSON, and no other reader takes them.
JSON = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
ARGUMENTS = {"arguments", "parameters"}


def _broken(error: Exception) -> tuple[str, JsonObject, str | None]:
    return "", {}, f"the call is not valid JSON: {error}"


def _call(text: str) -> tuple[str, JsonObject, str | None]:
    try:
        return _checked(JSON.decode(text))
    except (ValueError, RecursionError) as error:
        return _broken(error)


def _checked(call: object) -> tuple[str, JsonObject, str | None]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "", {}, "a call must be a JSON object with name and arguments"
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = JSON.decode(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return call["name"], {}, "arguments must be a JSON object"
    return call["name"], arguments, None


OWN: dict[str, Parser] = {"hermes": hermes, "llama3_json": llama3_json, "mistral": mistral}
# What a chat template prints around calls, and the form that it means. The first that fits: many
# print several.
SIGNS = (
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<|tool_call>call:", "gemma4"),
    ("<|tool_call_start|>", "lfm2"),
    ("<atem:invoke", "muse_glimmer"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ('"parameters"', "llama3_json"),
)


def find_parser(
    name: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[JsonObject]
) -> Parser:
    """The parser that `environments.tool_parser` names.

    Args:
        name: auto: by what the model's chat template prints; hermes, llama3_json, mistral; or one
            of vLLM's own.
        tokenizer: The model's.
        tools: Their schemas, which some of vLLM's parsers read.

    Raises:
        EnvironmentLoadError: There is no such parser, or it does not work with this model.
    """
    if name == "auto":
        template = str(tokenizer.chat_template or "")
        name = next((form for sign, form in SIGNS if sign in template), "hermes")
    return OWN[name] if name in OWN else _of_vllm(name, tokenizer, tools)


def _of_vllm(name: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[JsonObject]) -> Parser:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    try:
        parser_class = ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = ", ".join([*OWN, *ToolParserManager.list_registered()])
        raise EnvironmentLoadError(
            f"environments.tool_parser={name}: there is no such parser; there are {known}"
        ) from None
    request = ChatCompletionRequest(messages=[], tools=list(tools))
    try:
        parser = parser_class(tokenizer, request.tools)
    # Parsers raise what they like where a tokenizer lacks what they look for.
    except Exception as error:
        raise EnvironmentLoadError(
            f"environments.tool_parser={name}: vLLM's parser does not work with this model: {error}"
        ) from error

    def parse(text: str) -> tuple[str, Found]:
        try:
            extracted = parser.extract_tool_calls(text, request)
        # Of what the model wrote: the model is told.
        except Exception as error:  # noqa: BLE001
            return text, [("", {}, f"the call cannot be read: {str(error)[:200]}")]
        calls = [
            _checked({"name": call.function.name, "arguments": call.function.arguments})
            for call in extracted.tool_calls
        ]
        return (extracted.content or "") if calls else text, calls

    return parse


def written_call(
    tokenizer: PreTrainedTokenizerBase,
    template_arguments: Mapping[str, object],
    stop_ids: Sequence[int],
) -> str | None:
    """How the chat template writes a call of `TOOL`, which `reads` looks for; None: not at all."""
    native = supports_tools(tokenizer, template_arguments)
    given = {"tools": [TOOL]} if native else {}
    renderer = TokenizerRenderer(tokenizer, {**template_arguments, **given})
    for arguments in (EXAMPLE, json.dumps(EXAMPLE)):
        call = {"role": "assistant", "content": "", "tool_calls": [a_call(TOOL, 1, arguments)]}
        messages: list[JsonObject] = [QUESTION, call]
        shown = messages if native else tools_as_text(messages, [TOOL])
        try:
            opened, closed = renderer.chat_text(shown[:-1]), renderer.closed_text(shown)
        except RenderError:  # some want the arguments as a text
            continue
        # An answer may be opened with what a call has none of, `<think>` say.
        start = closed[: shared_prefix(opened, closed)]
        head, tag, name = start.rpartition("<")
        text = closed[len(head if tag and ">" not in name else start) :]
        text = completion_text(tokenizer, renderer.tokens_of(text), stop_ids)
        return text if TOOL["function"]["name"] in text else None
    return None


def reads(parser: Parser, written: str) -> bool:
    """Whether a parser, made for `TOOL`, finds the call of `written_call`."""
    return parser(written)[1] == [(TOOL["function"]["name"], EXAMPLE, None)]


def tool_calls(found: Found, before: int) -> list[ToolCall]:
    """The calls of a reply; `before`: how many the episode had already."""
    return [
        ToolCall(name, arguments, f"call{before + index:05}", error)
        for index, (name, arguments, error) in enumerate(found)
    ]
