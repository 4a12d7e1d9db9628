"""exact_number: right forms score 1, everything that could be gamed scores 0."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cohort.rewards.answer import exact_number

QUESTION = "What is 3 + 9? Reply with the number only."


def score(text: str, answer: Any = 12, question: Any = QUESTION) -> float | None:
    return exact_number([question], [text], [answer])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12", 12),
        ("12.", 12),
        ("12,", 12),
        (" 12\n", 12),
        ("12.0", 12),
        ("+12", 12),
        ("The answer is 12.", 12),
        ("**12**", 12),
        ("(12)", 12),
        ('"12"', 12),
        ("Answer:12", 12),
        ("3 + 9 = 12", 12),
        ("3+9=12", 12),
        ("The sum 3 + 9 = 12.", 12),
        ("-5", -5),
        ("2 - 7 = -5", -5),
        ("1,234", 1234),
        ("1,234,567.5", 1234567.5),
        ("12", "12"),
        ("1234", " 1,234 "),
        ("0.1", 0.1),
        (".5", 0.5),
        ("0.0000001", 1e-7),
    ],
)
def test_right(text: str, answer: Any) -> None:
    assert score(text, answer) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "13",
        "-12",
        "- 12",
        "−12",
        "112",
        "120",
        "1 2",
        "12 13",
        "12 12",
        "12 or 13",
        " ".join(str(number) for number in range(1, 19)),
        ",".join(str(number) for number in range(1, 19)),
        "\n".join(str(number) for number in range(1, 19)),
        "7, 8, 9, 10, 11, 12",
        QUESTION,
        QUESTION + " 12",
        "3 + 9",
        "3 + 9 = ",
        "3 + 9 = 12 = 12",
        "3 + 9 = 11 or 12",
        "12 = 3 + 9",
        "3 + 9 == 12",
        "3 + 9 equals 12",
        "= 11, 12",
        "12%",
        "12 %",
        "$12",
        "12a",
        "x12",
        "12/1",
        "24 / 2",
        "> 12",
        "12:30",
        "12-13",
        "12.0.0",
        "1,2",
        "1e1",
        "0xC",
        "1_2",
        "12\x00",
        "١٢",
        "\uff11\uff12",
        "¹²",
        "⑫",
        "Ⅻ",
        "12 ½",
        "1\u200b2",
        "12\ufe0f\u20e3",
        "twelve",
    ],
)
def test_wrong(text: str) -> None:
    assert score(text) == 0.0


def test_no_digit_spray_scores_for_any_answer() -> None:
    spray = " ".join(str(number) for number in range(200))
    assert exact_number([QUESTION] * 19, [spray] * 19, list(range(19))) == [0.0] * 19


def test_the_question_repeated_never_scores() -> None:
    assert score("Say 12.", question="Say 12.") == 0.0
    messages = [{"role": "user", "content": "Say 12."}]
    reply = [{"role": "assistant", "content": " Say 12.\n"}]
    assert exact_number([messages], [reply], [12]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "12" + " " * 1_000_000,
        "1" * 1_000_000,
        "1," * 500_000,
        "=" * 1_000_000,
        "a 12 " + "b" * 10**6,
    ],
)
def test_a_megabyte_is_cheap_and_scores_nothing(text: str) -> None:
    started = time.perf_counter()
    assert score(text) == 0.0
    assert time.perf_counter() - started < 0.2


def test_messages_and_order() -> None:
    messages = [{"role": "user", "content": QUESTION}]
    replies = [[{"role": "assistant", "content": text}] for text in ("12", "13", "3 + 9 = 12")]
    assert exact_number([messages] * 3, replies, [12] * 3) == [1.0, 0.0, 1.0]


def test_no_answer_does_not_apply() -> None:
    assert score("12", None) is None


@pytest.mark.parametrize("answer", ["twelve", "", "12 apples", True, float("nan"), [12]])
def test_an_answer_that_is_no_number_raises(answer: Any) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        score("12", answer)
