"""math-verify behind our extraction: values are compared, sprays and copies score nothing."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt
from cohort.rewards.maths import MathAnswer
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)

QUESTION = "What is 2 + 10? Put the answer in \\boxed{}."


@pytest.fixture(scope="module")
def boxed() -> MathAnswer:
    return MathAnswer(timeout_s=1)


def score(maths: MathAnswer, text: str, answer: Any = "12", question: Any = QUESTION) -> Any:
    return maths([question], [text], [answer])[0]


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("12", 12),
        ("12.0", "12"),
        (r"\frac{24}{2}", "12"),
        (r"\text{12}", "12"),
        (r"12\text{ cm}", "12"),
        ("x=12", "12"),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac12", "1/2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("(1, 2)", "(1,2)"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("1+x^2", "x^2+1"),
        ("1234", "1,234"),
        ("Friday", r"\text{Friday}"),
        ("72", "$72$"),
        ("7", r"so \boxed{7}"),
    ],
)
def test_right(boxed: MathAnswer, given: str, answer: Any) -> None:
    assert score(boxed, f"so \\boxed{{{given}}}", answer) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "the answer is 12",
        r"\boxed{}",
        r"\boxed{12",
        r"\boxed{13}",
        r"\boxed{-12}",
        r"\boxed{12} \boxed{13}",
        r"\boxed{12, 13}",
        r"\boxed{1,2,12}",
        r"\boxed{12 or 13}",
        r"\boxed{12 \text{ or } 13}",
        r"\boxed{12;13}",
        r"\boxed{12 13}",
        r"\boxed{[12,13]}",
        r"\boxed{12 \le 13}",
        r"\boxed{x>11}",
        r"\boxed{12\pm 1}",
        r"\boxed{\infty}",
        r"\boxed{x}",
        r"\boxed{*}",
        r"\boxed{١٢}",
        r"\boxed{１２}",
        r"\boxed{¹²}",
        QUESTION,
        r"\boxed{2 + 10}",
        r"\boxed{2+10}",
        " ".join(f"\\boxed{{{n}}}" for n in range(20)),
        "\\boxed{" + ",".join(map(str, range(100))) + "}",
        "\\boxed{" * 150_000,
        "12 " * 350_000,
    ],
)
def test_wrong(boxed: MathAnswer, text: str) -> None:
    started = time.perf_counter()
    assert score(boxed, text) == 0.0
    assert time.perf_counter() - started < 2.5


def test_an_ordered_pair_keeps_its_order(boxed: MathAnswer) -> None:
    assert score(boxed, r"\boxed{(2,1)}", "(1,2)") == 0.0


def test_tags_and_rows_without_an_answer() -> None:
    maths = MathAnswer(answer_in="tags")
    assert score(maths, r"<think>\boxed{3}</think><answer>$\frac{24}{2}$</answer>") == 1.0
    assert score(maths, r"<answer>\boxed{12}</answer>") == 1.0
    assert score(maths, r"\boxed{12}") == 0.0
    assert score(maths, "<answer>12</answer>", None) is None
    messages = [{"role": "user", "content": QUESTION}]
    reply = [{"role": "assistant", "content": "<answer>12</answer>"}]
    assert maths([messages], [reply], ["12"]) == [1.0]


HUGE = [
    "9^{9^{9^9}}", "9**9**9**9", "10^{10^{10}}", "100000000!", "(" * 900, "2^{2^{2^{2^{2^2}}}}",
    "3^{400000000}", r"\frac{1}{10^{10^{10}}}", r"\sum_{n=1}^{10^{12}} \frac{1}{n^n}",
    "9" * 400 + "^9", "1" * 100_000,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("given", HUGE)
def test_what_takes_too_much_is_wrong(boxed: MathAnswer, given: str) -> None:
    started = time.perf_counter()
    assert score(boxed, f"\\boxed{{{given}}}") == 0.0
    assert time.perf_counter() - started < 10
    # The next one is scored as before.
    assert score(boxed, r"\boxed{\frac{24}{2}}") == 1.0


@pytest.mark.slow
def test_a_rows_own_answer_that_takes_too_long_is_an_error(boxed: MathAnswer) -> None:
    found = score(boxed, r"\boxed{5}", "(" * 900)
    assert isinstance(found, TimeoutError)
    assert str(found).startswith("the row's answer '((((")
    assert len(str(found)) < 300


@pytest.mark.slow
def test_a_whole_group_of_endless_answers_takes_seconds() -> None:
    maths = MathAnswer(timeout_s=1)
    texts = ["\\boxed{100000000!}"] * 4 + [r"\boxed{\frac{24}{2}}"]
    started = time.perf_counter()
    assert maths([QUESTION] * 5, texts, ["12"] * 5) == [0.0] * 4 + [1.0]
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("options", [{"answer_in": "text"}, {"timeout_s": 0}, {"timeout_s": 0.5}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MathAnswer(**options)


@pytest.mark.slow
def test_the_bound_holds_in_the_reward_child() -> None:
    """A known right answer scores 1 beside one that never ends."""
    texts = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac{24}{2}}", r"\boxed{13}"]
    completions = tuple(
        Completion(f"c{i}", "p", np.arange(2), np.zeros(2, np.float32), "stop", i, (0, 0), text)
        for i, text in enumerate(texts)
    )
    group = Group("g", Prompt("p", (1,), QUESTION, {"answer": "12"}), completions)
    spec = RewardSpec("maths", "cohort.rewards.maths:MathAnswer", options={"timeout_s": 1})
    actor = RewardWorker([spec], 20, memory_bytes=2 << 30)
    child = actor.pids()[1]
    _, scored = actor.score(group)
    assert scored is not None
    assert scored.totals == (0.0, 1.0, 0.0)
    assert scored.errors == ()
    assert actor.pids()[1] == child
    actor.close()


def test_threads_take_turns(boxed: MathAnswer) -> None:
    texts = [rf"\boxed{{\frac{{{n}}}{{2}}}}" for n in (24, 26, 24, 28)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda text: score(boxed, text), texts)) == [1.0, 0.0, 1.0, 0.0]
