"""Tool calls in what a model wrote, by the model family's own form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cohort.actors.plain import JsonObject
from cohort.rewards.environments.base import EnvironmentLoadError, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# text -> (what is left of it, [(name, arguments, error)])
Found = list[tuple[str, JsonObject, str | None]]
Parser = Callable[[str], tuple[str, Found]]

# Without `\s*` beside `.*?` and before `\s*`: a reply of many spaces would take minutes.
HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LLAMA = re.compile(r"(?:<\|python_tag\|>\s*)?(\{.*)\Z", re.DOTALL)
MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*(.*)\Z", re.DOTALL)


def hermes(text: str) -> tuple[str, Found]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen, Hermes, SmolLM."""
    found = [_call(match.strip()) for match in HERMES.findall(text)]
    return HERMES.sub("", text).strip() if found else text, found


def llama3_json(text: str) -> tuple[str, Found]:
    """`{"name": ..., "parameters": {...}}` as the whole reply: Llama 3.1 and later."""
    match = LLAMA.match(text.lstrip())
    if match is None or '"name"' not in match[1]:
        return text, []
    return "", [_call(match[1])]


def mistral(text: str) -> tuple[str, Found]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`: Mistral."""
    match = MISTRAL.search(text)
    if match is None:
        return text, []
    left = text[: match.start()].strip()
    try:
        calls = json.loads(match[1])
    except (ValueError, RecursionError) as error:
        return left, [("", {}, f"the call is not valid JSON: {error}")]
    return left, [_checked(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(text: str) -> tuple[str, JsonObject, str | None]:
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as error:
        return "", {}, f"the call is not valid JSON: {error}"


def _checked(call: object) -> tuple[str, JsonObject, str | None]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "", {}, "a call must be a JSON object with name and arguments"
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return call["name"], {}, "arguments must be a JSON object"
    return call["name"], arguments, None


OWN: dict[str, Parser] = {"hermes": hermes, "llama3_json": llama3_json, "mistral": mistral}
# What a chat template prints around calls, and the form that it means.
SIGNS = (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ('"parameters"', "llama3_json"))


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
        EnvironmentLoadError: There is no such parser.
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
    parser = parser_class(tokenizer, request.tools)

    def parse(text: str) -> tuple[str, Found]:
        extracted = parser.extract_tool_calls(text, request)
        calls = [
            _checked({"name": call.function.name, "arguments": call.function.arguments})
            for call in extracted.tool_calls
        ]
        return (extracted.content or "") if calls else text, calls

    return parse


def tool_calls(found: Found, before: int) -> list[ToolCall]:
    """The calls of a reply; `before`: how many the episode had already."""
    return [
        ToolCall(name, arguments, f"call{before + index:05}", error)
        for index, (name, arguments, error) in enumerate(found)
    ]
