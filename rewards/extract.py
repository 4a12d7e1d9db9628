"""What part of a completion is its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from cohort.actors.text import prefill_of
from cohort.rewards.base import completion_texts

AnswerIn = Literal["boxed", "tags"]

BOX = "\\boxed{"
# A longer text is not taken for an answer. The bound also keeps a megabyte of braces cheap.
MAX_ANSWER = 1000
FENCE_END = re.compile(r"^```[ \t]*$", re.MULTILINE)
FENCE = re.compile(rf"^```([^\n`]*)\n(.*?){FENCE_END.pattern}", re.DOTALL | re.MULTILINE)
MAX_CODE = 100_000
# How models mark what they only think.
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# gpt-oss writes to channels; the answer is in the last message to this one.
CHANNEL, FINAL, MESSAGE_END = "<|channel|>", "<|channel|>final<|message|>", "<|end|>"


def final_part(text: str, prefill: str = "") -> str | None:
    """What a completion answers, without what it only thinks.

    That is what follows the last `</think>` (or `[/THINK]`), or gpt-oss's last final message; the
    whole text of a completion that marks no thinking.

    Args:
        text: The completion.
        prefill: What the answer begins with in the prompt; it may have opened the thinking.

    Returns:
        The part; None when the thinking is not closed or a final message is missing.
    """
    for opening, closing in THINKING:
        _, closed, after = text.rpartition(closing)
        if closed:
            if opening in after:
                return None
            text = after
        elif opening in text or left_open(prefill) == closing:
            return None
    if CHANNEL in text:
        _, found, after = text.rpartition(FINAL)
        return after.partition(MESSAGE_END)[0] if found else None
    return text


def left_open(prefill: str) -> str:
    """The tag that closes the thinking which `prefill` leaves open; "" for none."""
    for opening, closing in THINKING:
        if prefill.rfind(opening) > prefill.rfind(closing):
            return closing
    return ""


def final_parts(
    completions: Sequence[object],
    prefills: Sequence[str] | None = None,
    prompts: Sequence[Any] | None = None,
) -> list[str | None]:
    """`final_part` of each completion.

    Args:
        completions: Texts, or lists of messages.
        prefills: What each answer begins with; without them they are read off the prompts, as far
            as these tell.
        prompts: Of the completions.
    """
    texts = completion_texts(completions)
    begun = beginnings(len(texts), prefills, prompts)
    return [final_part(text, prefill) for text, prefill in zip(texts, begun, strict=True)]


def beginnings(
    count: int, prefills: Sequence[str] | None, prompts: Sequence[Any] | None
) -> Sequence[str]:
    """What each answer begins with in its prompt.

    Args:
        count: Answers.
        prefills: The beginnings, where they are known.
        prompts: Texts, or lists of messages; used without `prefills`.

    Returns:
        `count` texts, "" where nothing is known.
    """
    if prefills is not None:
        return prefills
    return [""] * count if prompts is None else [prefill_of(prompt) for prompt in prompts]


def question_of(prompt: Any) -> str:
    """The text of a prompt that is one; of messages, the last that is not the assistant's."""
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message["role"] != "assistant"]
    return str((asked or prompt)[-1]["content"])


def answer_of(text: str, answer_in: AnswerIn, prefill: str = "") -> str | None:
    """The answer in the last box, or between the answer tags, of the final part of a text.

    Args:
        text: A completion.
        answer_in: "boxed" or "tags".
        prefill: As for `final_part`.

    Returns:
        The answer; None when there is none.

    Raises:
        ValueError: `answer_in` is something else.
    """
    final = final_part(text, prefill) or ""
    if answer_in == "boxed":
        return last_boxed(final)
    if answer_in == "tags":
        return tagged(final, "answer")
    raise ValueError(f"answer_in must be 'boxed' or 'tags', got {answer_in!r}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, stripped; None when it is empty or not closed.

    Only the last box counts: it is what a completion commits to. Of nested boxes that is the inner
    one. None for more than 1000 characters.
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth, position = 1, start
    while position < min(len(text), start + MAX_ANSWER + 1):
        character = text[position]
        if character == "\\":
            position += 1  # what follows is escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip() or None
        position += 1
    return None


def tagged(text: str, tag: str, limit: int = MAX_ANSWER) -> str | None:
    """What stands between `<tag>` and `</tag>`, stripped.

    Args:
        text: The final part of a completion.
        tag: The name of the tag.
        limit: Characters that it may have, with the whitespace around it.

    Returns:
        The text; None when it is empty or too long, or either tag is there more than once: a
        completion must commit to one answer.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    if end < start or end - start > limit:
        return None
    return text[start:end].strip() or None


def last_code(text: str, language: str = "python") -> str | None:
    """The last fenced block of a language, or of none.

    Args:
        text: The final part of a completion.
        language: As the fence names it.

    Returns:
        The code; None without a closed block, and for more than 100,000 characters.
    """
    if len(text) > 10 * MAX_CODE:
        return None
    # No further than the last end: from each open fence behind it the whole rest would be searched.
    ends = [match.end() for match in FENCE_END.finditer(text)]
    blocks = [
        body
        for info, body in FENCE.findall(text[: max(ends, default=0)])
        if info.strip().lower() in (language, language[:2], f"{language}3", "")
    ]
    if not blocks or not blocks[-1].strip() or len(blocks[-1]) > MAX_CODE:
        return None
    return str(blocks[-1])
