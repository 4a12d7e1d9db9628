"""Rewards that compare the final answer of a completion with the known one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.extract import AnswerIn, answer_of, beginnings, final_parts, question_of

# ASCII digits only: "12", "-5", "+5", "1,234", "12.0", ".5".
NUMBER = re.compile(r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)
# Longer texts do not state one number; the bound also keeps a megabyte of text cheap.
MAX_CHARACTERS = 1000
OPENING = "\"'(*_`[{"
CLOSING = "\"')*_`]}.,;:!?"
OPERATORS = frozenset("+-*/^%×÷−–—=<>≠≈±&|~")


def final_number(text: str) -> Decimal | None:
    """The one number that a text commits to, or None.

    1. A text of more than 1000 characters has none.
    2. With one "=" only what follows it counts ("3 + 4 = 7"); with several there is no answer.
    3. What counts must have exactly one word with a digit in it, of any script (words end at
       whitespace and ":"), and that word must be a number in ASCII digits once quotes, brackets,
       emphasis and closing punctuation are removed: "12", "12.", "**-5**", "1,234", "12.0"; not
       "12%", "$12", "12a", "3-4", "1/2", "²".
    4. A word made only of operators there ("- 5", "5 or > 6") leaves no answer: what it does to the
       number is not known.
    """
    if len(text) > MAX_CHARACTERS or text.count("=") > 1:
        return None
    words = text.rpartition("=")[2].replace(":", " ").split()
    if any(OPERATORS.issuperset(word) for word in words):
        return None
    candidates = [word for word in words if any(character.isnumeric() for character in word)]
    if len(candidates) != 1:
        return None
    return parse_number(candidates[0].lstrip(OPENING).rstrip(CLOSING))


def parse_number(text: str) -> Decimal | None:
    """The value of a text that is a number and nothing else, or None."""
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


@per_completion
def exact_number(
    prompts: Sequence[object],
    completions: Sequence[object],
    answer: Sequence[object],
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[float | None]:
    """1.0 where the completion's final number (see `final_number`) equals `answer`, else 0.0.

    What a completion only thinks does not count (see `cohort.rewards.extract.final_part`). A
    completion that repeats the question scores 0.

    Args:
        prompts: Of the completions.
        completions: Texts, or lists of messages.
        answer: Numbers or texts of numbers; None where the row has none.
        prefills: What each answer begins with in its prompt.

    Returns:
        One score a completion; None where the row has no answer.

    Raises:
        ValueError: An answer is not a number: the data are wrong, not the completion.
    """
    scores: list[float | None] = []
    texts = final_parts(completions, prefills, prompts)
    for prompt, final, target in zip(prompts, texts, answer, strict=True):
        if target is None:
            scores.append(None)
            continue
        # float is compared by its shortest text: 0.1 is the answer "0.1", not its binary value.
        expected = None if isinstance(target, bool) else _target(str(target))
        if expected is None:
            raise ValueError(f"the answer {str(target)[:80]!r} is not a number")
        text = final or ""
        question = question_of(prompt)
        echo = len(text) <= MAX_CHARACTERS and text.strip() == question.strip()
        scores.append(float(not echo and final_number(text) == expected))
    return scores


@per_completion
def boxed_answer(
    completions: Sequence[object],
    answer: Sequence[object],
    prompts: Sequence[object] | None = None,
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[float | None]:
    r"""1.0 where the last `\boxed{...}` holds `answer` (see `same_text`), else 0.0.

    A box in what a completion only thinks does not count (see `cohort.rewards.extract.final_part`).

    Args:
        completions: Texts, or lists of messages.
        answer: The right answers; None where the row has none.
        prompts: Of the completions.
        prefills: What each answer begins with in its prompt.

    Returns:
        One score a completion; None where the row has no answer.
    """
    begun = beginnings(len(completions), prefills, prompts)
    return _compared(completions, answer, "boxed", begun)


@per_completion
def tagged_answer(
    completions: Sequence[object],
    answer: Sequence[object],
    prompts: Sequence[object] | None = None,
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[float | None]:
    """1.0 where the one `<answer>...</answer>` holds `answer` (see `same_text`), else 0.0.

    Tags in what a completion only thinks do not count (see `cohort.rewards.extract.final_part`).

    Args:
        completions: Texts, or lists of messages.
        answer: The right answers; None where the row has none.
        prompts: Of the completions.
        prefills: What each answer begins with in its prompt.

    Returns:
        One score a completion; None where the row has no answer.
    """
    begun = beginnings(len(completions), prefills, prompts)
    return _compared(completions, answer, "tags", begun)


def same_text(given: str, known: str) -> bool:
    """Whether two answers are the same number in ASCII digits, or else the same text.

    Case and the amount of whitespace do not count. Two empty texts are no answer.
    """
    left, right = parse_number(given.strip()), parse_number(known.strip())
    if left is not None and right is not None:
        return left == right
    given, known = " ".join(given.split()).casefold(), " ".join(known.split()).casefold()
    return given == known != ""


def _compared(
    completions: Sequence[object],
    answer: Sequence[object],
    answer_in: AnswerIn,
    begun: Sequence[str],
) -> list[float | None]:
    scores: list[float | None] = []
    for text, known, prefill in zip(completion_texts(completions), answer, begun, strict=True):
        given = answer_of(text, answer_in, prefill)
        right = given is not None and same_text(given, str(known))
        scores.append(None if known is None else float(right))
    return scores


def _target(text: str) -> Decimal | None:
    plain = parse_number(text.strip())
    if plain is None and re.fullmatch(r"-?[0-9.]+e[-+]?[0-9]+", text):  # str(1e-07)
        return Decimal(text)
    return plain
