"""What a tokenizer's chat template makes of the turns of an episode, for `cohort check`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cohort.rewards.continuation import Continuation
from cohort.rewards.rendering import RenderError
from cohort.rewards.tool_messages import QUESTION, TOOL, Message, a_call, a_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = "Two and three."


@dataclass(frozen=True)
class ProofLine:
    """What a tokenizer's template makes of one case.

    Attributes:
        case: In words.
        result: `exact`: appending gives what the template writes. `rewritten`: the template changes
            what came before, so that `task.history` decides. `refused`: it cannot be done.
        why: The first text that differs, or the template's error; None when exact.

    Example:
        >>> ProofLine("a plain reply", "exact", None).result
        'exact'
    """

    case: str
    result: Literal["exact", "rewritten", "refused"]
    why: str | None


def prove(
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, object]] | None = None,
    template_arguments: Mapping[str, object] | None = None,
    stop_ids: Collection[int] = (),
) -> list[ProofLine]:
    """Whether appending gives what the template writes, in the cases that episodes are made of.

    Raises:
        RenderError: As `Continuation` does.

    Example:
        >>> for line in prove(tokenizer)[:2]:
        ...     print(line.case, line.result)
        a plain reply exact
        an empty reply exact
    """
    tool = (tools or [TOOL])[0]
    continuation = Continuation(tokenizer, tools or [TOOL], template_arguments, stop_ids)
    says = {"role": "assistant", "content": "It is five"}
    one = {"role": "assistant", "content": "", "tool_calls": [a_call(tool, 1, {})]}
    two = {**one, "tool_calls": [a_call(tool, 1, {}), a_call(tool, 2, {})]}
    # Templates call it by the one name or the other.
    thinking = {"thinking": THOUGHT, "reasoning_content": THOUGHT}
    user = {"role": "user", "content": "Go on."}
    first, second = a_result(tool, 1, "3"), a_result(tool, 2, "5")
    cases: list[tuple[str, Message, list[Message], int]] = [
        ("a plain reply", says, [user], 0),
        ("an empty reply", {**says, "content": ""}, [user], 0),
        ("a truncated reply", says, [user], 1),
        ("a reply with thinking", {**says, **thinking}, [user], 0),
        ("a tool call", one, [first], 0),
        ("a tool call with thinking", {**one, **thinking}, [first], 0),
        ("two tool results", two, [first, second], 0),
        ("a user's message after a tool result", one, [first, user], 0),
    ]
    prompt = continuation.prompt_ids([QUESTION])
    lines = []
    for case, reply, new, cut in cases:
        written = continuation.example([QUESTION], reply)
        sampled = written[: len(written) - cut]
        try:
            extension = continuation.extend([QUESTION], prompt, sampled, new, reply)
        except RenderError as error:
            lines.append(ProofLine(case, "refused", str(error)))
            continue
        result: Literal["exact", "rewritten"] = "exact" if extension.exact else "rewritten"
        lines.append(ProofLine(case, result, extension.why))
    return lines
