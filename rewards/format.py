"""Rewards for the shape of a completion. Give them a small weight: shape alone is easy to learn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cohort.rewards.answer import MAX_CHARACTERS, NUMBER
from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.extract import beginnings, final_part

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_ANSWER = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


@per_completion
def number_only(
    completions: Sequence[object],
    prompts: Sequence[object] | None = None,
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[float]:
    """1.0 where the completion is a number in ASCII digits and nothing else but whitespace.

    A number inside thinking that the prompt has opened does not count.

    Args:
        completions: Texts, or lists of messages.
        prompts: Of the completions.
        prefills: What each answer begins with in its prompt.

    Returns:
        One score a completion.
    """
    return [
        float(
            len(text) <= MAX_CHARACTERS
            and NUMBER.fullmatch(text.strip()) is not None
            and final_part(text, prefill) is not None
        )
        for text, prefill in zip(
            completion_texts(completions),
            beginnings(len(completions), prefills, prompts),
            strict=True,
        )
    ]


@per_completion
def tagged_think_answer(
    completions: Sequence[object],
    prompts: Sequence[object] | None = None,
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[float]:
    """1.0 where the completion is `<think>...</think> <answer>...</answer>`, the format of R1.

    Each tag exactly once, text inside both pairs, only whitespace outside of them. Where the prompt
    opens `<think>` itself (its template, or a last message of the assistant like "Let me solve this
    step by step. <think>"), the completion goes on from there, and must not open it again. The
    format is that of DeepSeek-R1 (arXiv:2501.12948, table 1).

    Args:
        completions: Texts, or lists of messages.
        prompts: Of the completions.
        prefills: What each answer begins with in its prompt.

    Returns:
        One score a completion.
    """
    begun = beginnings(len(completions), prefills, prompts)
    return [
        _tagged(prefill[prefill.index("<think>") :] + text if "<think>" in prefill else text)
        for text, prefill in zip(completion_texts(completions), begun, strict=True)
    ]


def _tagged(text: str) -> float:
    # Counting first also keeps the match linear: with unique tags there is nothing to try again.
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    match = THINK_ANSWER.fullmatch(text)
    return float(match is not None and all(part.strip() for part in match.groups()))
