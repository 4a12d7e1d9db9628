"""What part of a completion is its answer."""

from __future__ import annotations

import re
from typing import Literal

AnswerIn = Literal["boxed", "tags"]

BOX = "\\boxed{"
# A longer answer is none; the bound also keeps a megabyte of braces cheap.
MAX_ANSWER = 1000
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
MAX_CODE = 100_000


def answer_of(text: str, answer_in: AnswerIn) -> str | None:
    """The answer in the last box, or between the answer tags; None when there is none.

    Raises ValueError for another `answer_in`.
    """
    if answer_in == "boxed":
        return last_boxed(text)
    if answer_in == "tags":
        return tagged(text, "answer")
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
    """What stands between `<tag>` and `</tag>`, stripped; None when it is empty or too long.

    limit: characters, the whitespace around included.
    None also when either tag is there more than once: a completion must commit to one answer.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    if end < start or end - start > limit:
        return None
    return text[start:end].strip() or None


def last_code(text: str, language: str = "python") -> str | None:
    """The last fenced block of this language (or of none), or None.

    Text after an opening fence that is never closed is no code. None for more than 100,000
    characters.
    """
    if len(text) > 10 * MAX_CODE:
        return None
    blocks = [
        body
        for info, body in FENCE.findall(text)
        if info.strip().lower() in (language, language[:2], f"{language}3", "")
    ]
    if not blocks or not blocks[-1].strip() or len(blocks[-1]) > MAX_CODE:
        return None
    return str(blocks[-1])
