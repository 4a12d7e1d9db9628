"""What a completion only thinks does not earn, whichever function scores it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt
from cohort.actors.text import completion_text, prefill_of
from cohort.rewards.answer import boxed_answer, exact_number, tagged_answer
from cohort.rewards.base import score_group
from cohort.rewards.code import CodeTests
from cohort.rewards.extract import final_part
from cohort.rewards.format import number_only, tagged_think_answer
from cohort.rewards.loading import load_function
from cohort.rewards.reasoning_gym import _answer
from cohort.rewards.reward_model import _text
from cohort.rewards.tasks import PromptRenderer, Row
from cohort.rewards.travel.plan import PlanError, parse_plan
from tests.templates import FAMILIES, tokenizer_of

QUESTION = {"role": "user", "content": "What is 2 + 3?"}


def begun(text: str) -> list[dict[str, str]]:
    return [QUESTION, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "prefill", "final"),
    [
        ("5", "", "5"),
        ("<think>5</think>6", "", "6"),
        ("a</think>5", "<think>\n", "5"),
        ("<think>a</think>b<think>c</think>5", "", "5"),
        ("<think>5", "", None),
        ("5", "<think>\n", None),
        ("5", "Let me see. <think>", None),
        ("5", "<think>\n\n</think>\n\n", "5"),
        ("a</think>b<think>5", "<think>", None),
        ("[THINK]4[/THINK]5", "", "5"),
        ("[THINK]5", "", None),
        ("<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>5",
         "", "5"),
        ("<|channel|>analysis<|message|>5", "", None),
        ("<|channel|>final<|message|>5<|end|><|start|>user", "", "5"),
    ],
)  # fmt: skip
def test_the_final_part(text: str, prefill: str, final: str | None) -> None:
    assert final_part(text, prefill) == final


@pytest.mark.parametrize(
    ("content", "text", "prefill"),
    [
        ([QUESTION], "<|User|>x<|Assistant|><think>\n", "<think>\n"),
        ([QUESTION], "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ([QUESTION], "write <think> first<|im_end|>\n<|im_start|>assistant\n", ""),
        (begun("Let me see.\n<think>"), None, "Let me see.\n<think>"),
        ("Assistant: Let me see.\n<think>", None, "<think>"),
        ("2 + 3 =", None, ""),
        ([QUESTION], None, ""),
    ],
)
def test_what_a_prompt_begins(content: Any, text: str | None, prefill: str) -> None:
    assert prefill_of(content, text) == prefill
    assert Prompt("p", (1,), content, text=text).prefill == prefill


BOXED, TAGGED = "\\boxed{5}", "<answer>5</answer>"


@pytest.mark.parametrize("function", [boxed_answer, tagged_answer, exact_number])
def test_an_answer_inside_thinking_earns_nothing(function: Any) -> None:
    answer = {boxed_answer: BOXED, tagged_answer: TAGGED, exact_number: "5"}[function]
    earns = {
        answer: 1.0,
        f"<think>{answer}</think>": 0.0,
        f"<think>{answer}</think> I do not know": 0.0,
        f"<think>{answer}": 0.0,
        f"<think>{answer.replace('5', '4')}</think>{answer}": 1.0,
        f"<think>{answer}</think>{answer.replace('5', '4')}": 0.0,
    }
    count = len(earns)
    got = function(prompts=[[QUESTION]] * count, completions=list(earns), answer=[5] * count)
    assert got == list(earns.values())
    # The prompt has opened the thinking.
    earns = {answer: 0.0, f"{answer}</think>": 0.0, f"so</think>{answer}": 1.0}
    got = function(
        prompts=[[QUESTION]] * 3, completions=list(earns), answer=[5] * 3, prefills=["<think>"] * 3
    )
    assert got == list(earns.values())
    got = function(prompts=[begun("<think>")] * 3, completions=list(earns), answer=[5] * 3)
    assert got == list(earns.values())


def test_maths_programs_plans_and_puzzles_inside_thinking() -> None:
    pytest.importorskip("math_verify")
    maths = load_function("maths")
    texts = [f"<think>{BOXED}</think>", f"<think>{BOXED}", f"<think>no</think>{BOXED}"]
    scores = maths([[QUESTION]] * 3, texts, [5] * 3, prefills=[""] * 3)
    assert scores == [0.0, 0.0, 1.0]
    assert maths([begun("<think>")], [BOXED], [5]) == [0.0]
    program = "```python\nprint(5)\n```"
    code = CodeTests(sandbox="none")
    tests = [[{"input": "", "output": "5"}]] * 3
    got = code(
        [f"<think>{program}</think>", f"<think>{program}", f"<think></think>{program}"], tests
    )
    assert [item["score"] for item in got] == [0.0, 0.0, 1.0]  # type: ignore[index]
    with pytest.raises(PlanError):
        parse_plan('<think>{"days": []}')
    assert _answer(final_part("<think>" + TAGGED) or "", "tags") is None


@pytest.mark.parametrize(
    ("prefill", "completion", "score"),
    [
        ("", "<think>a</think><answer>5</answer>", 1.0),
        ("", "a</think><answer>5</answer>", 0.0),
        ("<think>", "a</think>\n<answer>5</answer>", 1.0),
        ("Let me solve this step by step.\n<think>", "a</think>\n<answer>5</answer>", 1.0),
        ("<think>", "<think>a</think>\n<answer>5</answer>", 0.0),
        ("<think>", "a<answer>5</answer>", 0.0),
        ("<think>", "</think><answer>5</answer>", 0.0),
        ("Sure.", "<think>a</think><answer>5</answer>", 1.0),
    ],
)
def test_the_format_of_r1_with_a_beginning(prefill: str, completion: str, score: float) -> None:
    assert tagged_think_answer([completion], prefills=[prefill]) == [score]
    if prefill:
        assert tagged_think_answer([completion], prompts=[begun(prefill)]) == [score]


def test_a_number_inside_open_thinking_is_none() -> None:
    assert number_only(["5"], prefills=["<think>"]) == [0.0]
    assert number_only(["5"], prefills=[""]) == [1.0]


def one(prompt: Prompt, text: str) -> Group:
    ids = np.zeros(1, dtype=np.int64)
    completion = Completion("c", prompt.id, ids, ids.astype(np.float32), "stop", 0, (0, 0), text)
    return Group("g", prompt, (completion,))


@pytest.mark.parametrize("name", ["qwen3", "deepseek r1", "llama3"])
def test_r1s_rewards_through_a_real_template(name: str) -> None:
    """From the row to the score: tags that are special tokens, and a beginning in the prompt."""
    tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == name))
    prompt = PromptRenderer(tokenizer).render(Row("r", begun("<think>"), {"answer": "5"}), 0)
    wrote = "2 and 3 make 5</think><answer>5</answer>"
    ids = tokenizer(wrote, add_special_tokens=False)["input_ids"]
    group = one(prompt, completion_text(tokenizer, [*ids, tokenizer.eos_token_id]))
    for function in (tagged_think_answer, tagged_answer):
        assert score_group(function, "f", group).values == (1.0,)
    closed_only = one(prompt, "<answer>5</answer>")
    for function in (tagged_think_answer, tagged_answer):
        assert score_group(function, "f", closed_only).values == (0.0,)


def test_a_reward_model_reads_one_answer() -> None:
    assert _text(begun("So "), "5") == {"messages": begun("So 5")}
    assert _text([QUESTION], "5") == {"messages": begun("5")}
