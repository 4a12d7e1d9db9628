"""What a model wrote, as text: the one way from a completion's tokens to what rewards read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

# Thinking that a prompt has opened, and perhaps closed, for the model: the end of the prompt.
OPENED = re.compile(r"(?:<think>\s*(?:</think>\s*)?|\[THINK\]\s*)\Z")


class Tokenizer(Protocol):
    """What a text needs of a tokenizer; those of transformers have it."""

    eos_token_id: int | None
    pad_token_id: int | None

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str: ...


def completion_text(
    tokenizer: Tokenizer, token_ids: Iterable[int], stop_ids: Collection[int] = ()
) -> str:
    """The text of a completion, special tokens included.

    Only tokens that end a completion are left out: `stop_ids` (what the engine stops at), the
    tokenizer's end of sequence, and its padding. A tag like `<think>` is text whether or not the
    tokenizer has a special token for it. Spaces stay as the model wrote them.
    """
    hidden = {*stop_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    kept = [int(token) for token in token_ids if int(token) not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def prefill_of(content: str | Sequence[Mapping[str, object]], text: str | None = None) -> str:
    """What the answer to a prompt begins with before the model's own words; "" for most prompts.

    That is a last message of the assistant, else thinking that is opened at the end of the prompt
    (`<think>`).

    Args:
        content: A prompt, as a text or messages.
        text: The prompt as the model reads it.
    """
    if not isinstance(content, str) and content and content[-1]["role"] == "assistant":
        return str(content[-1]["content"])
    if text is None:
        text = content if isinstance(content, str) else ""
    opened = OPENED.search(text[-200:])
    return opened.group() if opened else ""
