"""Rewards for the shape of a completion. Give them a small weight: shape alone is easy to learn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.answer import MAX_CHARACTERS, NUMBER
from rewards.base import completion_texts

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_ANSWER = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def number_only(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the completion is a number in ASCII digits and nothing else but whitespace."""
    return [
        float(len(text) <= MAX_CHARACTERS and NUMBER.fullmatch(text.strip()) is not None)
        for text in completion_texts(completions)
    ]


def tagged_think_answer(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the completion is `<think>...</think> <answer>...</answer>`, the format of R1.

    Each tag exactly once, text inside both pairs, only whitespace outside of them. For prompts
    whose template does not open `<think>` itself. The format is that of DeepSeek-R1
    (arXiv:2501.12948, table 1).
    """
    return [_tagged(text) for text in completion_texts(completions)]


def _tagged(text: str) -> float:
    # Counting first also keeps the match linear: with unique tags there is nothing to try again.
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    match = THINK_ANSWER.fullmatch(text)
    return float(match is not None and all(part.strip() for part in match.groups()))
