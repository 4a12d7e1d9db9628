"""The format rewards are strict."""

from __future__ import annotations

import time

import pytest

from cohort.rewards.format import number_only, tagged_think_answer

GOOD = "<think>3 and 4</think>\n<answer>7</answer>"


@pytest.mark.parametrize("text", ["7", " 7\n", "-7", "+7", "1,234", "7.5", ".5"])
def test_number_only_right(text: str) -> None:
    assert number_only([text]) == [1.0]


@pytest.mark.parametrize(
    "text", ["", "7.", "7!", "The answer is 7", "7 8", "3 + 4 = 7", "٧", "²", "7" * 2000, "1,23"]
)
def test_number_only_wrong(text: str) -> None:
    assert number_only([text]) == [0.0]


@pytest.mark.parametrize(
    "text", [GOOD, f"\n {GOOD} \n", "<think>a\nb</think><answer>c\nd</answer>"]
)
def test_tags_right(text: str) -> None:
    assert tagged_think_answer([text]) == [1.0]
    assert tagged_think_answer([[{"role": "assistant", "content": text}]]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "<answer>7</answer>",
        "<think></think><answer>7</answer>",
        "<think>a</think><answer> </answer>",
        "<answer>7</answer><think>a</think>",
        f"Sure! {GOOD}",
        f"{GOOD} Done.",
        GOOD + GOOD,
        "<think>a</think> so <answer>7</answer>",
        "<think>a</think><answer>7</answer",
        "<think>a<answer>7</answer></think>",
        "<think>a</think><answer>7<answer></answer></answer>",
        "<think><think>a</think></think><answer>7</answer>",
        "<THINK>a</THINK><ANSWER>7</ANSWER>",
    ],
)
def test_tags_wrong(text: str) -> None:
    assert tagged_think_answer([text]) == [0.0]


def test_a_megabyte_is_cheap() -> None:
    texts = ["<think>" * 150_000, "<think>a</think>" + " " * 10**6, f"<think>{'</' * 500_000}"]
    started = time.perf_counter()
    assert tagged_think_answer(texts) == [0.0, 0.0, 0.0]
    assert number_only(["7" * 10**6]) == [0.0]
    assert time.perf_counter() - started < 0.5
