"""Boxes, tags and code blocks: only what a completion commits to."""

from __future__ import annotations

import time

import pytest

from cohort.rewards.answer import boxed_answer, same_text, tagged_answer
from cohort.rewards.extract import last_boxed, last_code, tagged


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} then \boxed{12}", "12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{a}}}", "a"),
        ("", None),
        ("12", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{12", None),
        (r"\boxed{1} \boxed{12", None),
        (r"\boxed 12", None),
        (r"\boxed{12\}", None),
        ("\\boxed{" + "1" * 1001 + "}", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 12 </answer>", "12"),
        ("<think>a</think><answer>1\n2</answer> bye", "1\n2"),
        ("<answer>1</answer><answer>12</answer>", None),
        ("<answer>1<answer>12</answer></answer>", None),
        ("</answer>12<answer>", None),
        ("<answer>12", None),
        ("<answer></answer>", None),
        ("", None),
        ("<ANSWER>12</ANSWER>", None),
    ],
)
def test_tagged(text: str, answer: str | None) -> None:
    assert tagged(text, "answer") == answer


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nx\n```\nor\n```py\ny\n```\nbye", "y\n"),
        ("```python3\ny\n```", "y\n"),
        ("```python\nx\n```\n```text\ny\n```", "x\n"),
        ("print(1)", None),
        ("", None),
        ("```python\nx", None),
        ("```python\n\n```", None),
        ("```java\nx\n```", None),
    ],
)
def test_last_code(text: str, code: str | None) -> None:
    assert last_code(text) == code


@pytest.mark.parametrize(
    ("given", "known", "same"),
    [
        ("12", "12.0", True),
        ("1,234", "1234", True),
        ("New  York", "new york", True),
        ("12", "13", False),
        ("1 2", "12", False),
        ("", "", False),
        (" ", "", False),
        ("١٢", "12", False),
        ("²", "2", False),
        ("1e1", "10", False),
    ],
)
def test_same_text(given: str, known: str, same: bool) -> None:
    assert same_text(given, known) is same


SPRAY = " ".join(f"\\boxed{{{n}}}" for n in range(20))
TAGS = "".join(f"<answer>{n}</answer>" for n in range(20))


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (boxed_answer, r"it is \boxed{12}", [SPRAY, r"\boxed{11 or 12}", r"\boxed{1, 12}", "12"]),
        (tagged_answer, "<answer>12</answer>", [TAGS, "<answer>11 12</answer>", "Answer: 12"]),
    ],
)
def test_answers_score_what_is_committed_to(function: object, good: str, bad: list[str]) -> None:
    assert callable(function)
    assert function([good], [12]) == [1.0]
    assert function([[{"role": "assistant", "content": good}]], ["12"]) == [1.0]
    assert function([good], [None]) == [None]
    echo = "What is 7 + 5? Put it in \\boxed{} or <answer></answer>."
    for text in (*bad, "", echo):
        assert function([text], [12]) == [0.0], text


def test_a_megabyte_is_cheap() -> None:
    texts = [
        "\\boxed{" * 150_000,
        "{" * 10**6,
        "\\boxed{" + "{" * 10**6,
        "<answer>" * 120_000,
        "<answer>" + " " * 10**6 + "</answer>",
        "```" * 300_000,
        "```\n" * 200_000,
        "```python\n" * 100_000,
        "```python\n" + "x" * 10**6,
    ]
    started = time.perf_counter()
    for text in texts:
        assert last_boxed(text) is None
        assert tagged(text, "answer") is None
        assert last_code(text) is None
    assert time.perf_counter() - started < 2
