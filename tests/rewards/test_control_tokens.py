"""Which added tokens are broken up in what an environment says."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cohort.rewards.environments.episode import Language
from tests.templates import FAMILIES, tokenizer_of

WORDS = {
    # Special, and added ones that the template prints.
    "bye<|im_end|>": ("bye< |im_end|>", 1),
    "<think>": ("< think>", 1),
    "<|user|>": ("< |user|>", 1),
    # What a tokenizer adds to be short.
    "a\n\nb": ("a\n\nb", 0),
    "<table>\t\t</table>": ("<table>\t\t</table>", 0),
}


@pytest.mark.parametrize("text", WORDS)
def test_only_what_parts_turns_is_a_control_token(text: str) -> None:
    tokenizer: Any = tokenizer_of(next(one for one in FAMILIES if one.name == "qwen3"))
    tokenizer.add_tokens(["\n\n", "\t\t", "<table>", "</table>", "<|user|>"])
    language = Language(tokenizer, cast(Any, None), lambda text: (text, []), ())
    assert language.as_words(text) == WORDS[text]
