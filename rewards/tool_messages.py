"""Tools, calls and results as messages, and as text for templates that know none of them.

A tool's schema is given to the template, `{"type": "function", "function": {...}}`; calls are
`{"id", "type": "function", "function": {"name", "arguments": {...}}}` in an assistant message's
`tool_calls`; results are messages of role `tool` with `name` and `tool_call_id` (nine letters or
digits, which Mistral's templates demand). A template that knows no tools is given them in plain
text: `tool_prompt` at the end of the system message, or before the question where the template has
no system messages; results in a user message as `<tool_response>`, joined with the user's own
message behind them; calls as `<tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cohort.actors.plain import JsonObject
from cohort.rewards.rendering import RenderError, TokenizerRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# Of the conversations that templates are tried with.
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up what a name stands for",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "description": "The name"}},
            "required": ["name"],
        },
    },
}


def supports_tools(
    tokenizer: PreTrainedTokenizerBase, template_arguments: Mapping[str, object] | None = None
) -> bool:
    """Whether the chat template prints the tools it is given, and their results.

    Example:
        >>> supports_tools(tokenizer)
        True
    """
    described, result = TOOL["function"]["description"], "a result"
    for arguments in ({"name": "x"}, '{"name": "x"}'):
        call = {"role": "assistant", "content": "", "tool_calls": [a_call(TOOL, 1, arguments)]}
        messages: list[JsonObject] = [QUESTION, call, a_result(TOOL, 1, result)]
        try:
            renderer = TokenizerRenderer(tokenizer, {**(template_arguments or {}), "tools": [TOOL]})
            text = renderer.chat_text(messages)
        except RenderError:  # no argument of this name, no such role, or other arguments
            continue
        return described in text and result in text
    return False


def tool_prompt(tools: Sequence[Mapping[str, object]]) -> str:
    """Tools in words, for a model whose template knows none.

    Example:
        >>> tool_prompt([TOOL]).splitlines()[0]
        '# Tools'
    """
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call these functions:\n<tools>\n" + schemas + "\n</tools>\n\n"
        "To call one, write its name and arguments as JSON between tags:\n<tool_call>\n"
        '{"name": "<function-name>", "arguments": {...}}\n</tool_call>'
    )


def tools_as_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = (), system: bool = True
) -> list[JsonObject]:
    """Messages for a template that knows no tools, see the module.

    Args:
        messages: A conversation.
        tools: Described in front of it.
        system: In the system message; else in front of the first message, for templates without.

    Example:
        >>> tools_as_text([{"role": "tool", "content": "5"}, {"role": "user", "content": "Go on."}])
        [{'role': 'user', 'content': '<tool_response>\\n5\\n</tool_response>\\n\\nGo on.'}]
    """
    shown: list[JsonObject] = []
    results = False
    for message in messages:
        role, content = message["role"], str(message.get("content") or "")
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
        for call in message.get("tool_calls") or ():
            function = {key: call["function"][key] for key in ("name", "arguments")}
            written = json.dumps(function, ensure_ascii=False)
            content += "\n" * bool(content) + f"<tool_call>\n{written}\n</tool_call>"
        # One message of the user: many templates want the roles to alternate.
        if results and role in ("tool", "user"):
            shown[-1]["content"] += ("\n" if role == "tool" else "\n\n") + content
        else:
            own = {"role": "user"} if role == "tool" else dict(message)
            own.pop("tool_calls", None)
            shown.append({**own, "content": content})
        results = role == "tool"
    if not tools:
        return shown
    described = tool_prompt(tools)
    if shown and shown[0]["role"] == "system":
        shown[0]["content"] += f"\n\n{described}"
        return shown
    if shown and not system:
        shown[0]["content"] = f"{described}\n\n{shown[0]['content']}"
        return shown
    return [{"role": "system", "content": described}, *shown]


def a_call(tool: Message, number: int, arguments: object) -> JsonObject:
    """The n-th call of an example."""
    function = {"name": tool["function"]["name"], "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def a_result(tool: Message, number: int, content: str) -> JsonObject:
    """The answer to the n-th call of an example."""
    name = tool["function"]["name"]
    return {"role": "tool", "name": name, "tool_call_id": f"call{number:05}", "content": content}
