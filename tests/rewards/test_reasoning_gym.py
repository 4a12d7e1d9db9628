"""reasoning-gym's tasks: splits, its own scorer, answers written to cheat."""

from __future__ import annotations

import json
import pickle
import time
from typing import Any

import pytest
import reasoning_gym

from cohort.rewards.config import TaskConfig
from cohort.rewards.reasoning_gym import EVALUATED, score
from cohort.rewards.tasks import Row, Task, TaskError, load_task

pytest.importorskip("reasoning_gym")


def make(name: str, seed: int = 0, **options: Any) -> Task:
    return load_task(TaskConfig(name="reasoning_gym", options={"name": name, **options}), seed)


def scored(row: Row, *texts: str, answer_in: str = "tags") -> list[Any]:
    # As a reward child gets it.
    columns = pickle.loads(pickle.dumps(row.columns))
    n = len(texts)
    return score(list(texts), [columns["entry"]] * n, [columns["dataset"]] * n, answer_in=answer_in)


def scores(row: Row, *texts: str, answer_in: str = "tags") -> list[float]:
    return [item["score"] for item in scored(row, *texts, answer_in=answer_in)]


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_no_question_is_in_both_splits_whatever_the_seeds() -> None:
    train, held = set(), set()
    for seed in (0, 1):
        task = make("chain_sum", seed, config=SUMS, train_size=150, eval_size=30)
        train |= {json.dumps(task.train_row(i).content) for i in range(150)}
        held |= {json.dumps(task.eval_row(i).content) for i in range(30)}
    assert not train & held
    assert len(train) > 60
    assert len(held) > 10


def test_rows_are_the_same_in_another_task_of_the_same_seed() -> None:
    rows = [make("countdown", 3).train_row(7) for _ in range(2)]
    assert rows[0] == rows[1] != make("countdown", 4).train_row(7)
    json.dumps(rows[0].columns)
    system, user = rows[0].content
    assert "<answer>" in system["content"]  # type: ignore[index]
    assert "Calculate" in user["content"] or "sing" in user["content"] or "make" in user["content"]  # type: ignore[index]


def test_countdown_keeps_its_partial_credit() -> None:
    row = make("countdown").train_row(0)
    right = str(row.columns["answer"])
    full, wrong, none, twice, empty = scores(
        row,
        f"<think>x</think> <answer>{right}</answer>",
        "<answer>1 + 1</answer>",
        right,
        f"<answer>{right}</answer> <answer>{right}</answer>",
        "",
    )
    assert full == 1.0
    assert 0 < wrong < 0.2
    assert none == twice == empty == 0.01


PROGRAMS = [
    '__import__("os").system("touch /tmp/owned")',
    "exec(chr(105))",
    "open",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "print(1)",
    "x.__class__",
    "(lambda: 1)()",
]


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_what_scorers_evaluate_is_no_program(name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    row = make(name).train_row(0)
    # A name without brackets calls nothing: lists of names are left to the scorer.
    programs = [text for text in PROGRAMS if text != "open" or "[^" not in EVALUATED[name].pattern]
    for result in scored(row, *(f"<answer>{text}</answer>" for text in programs)):
        assert result["unreadable"] == 1.0
        assert result["score"] <= 0.05


def test_countdown_computes_no_tower_of_powers_and_no_megabyte() -> None:
    row = make("countdown").train_row(0)
    texts = ["9**9**9**9", "1+" * 500_000, "9" * 30_000]
    assert scores(row, *texts, answer_in="text") == [0.01] * 3


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_the_known_answer_passes_the_guard(name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    task = make(name)
    for index in range(5):
        row = task.train_row(index)
        assert scores(row, str(row.columns["answer"]), answer_in="text") == [1.0]


def test_an_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    row = make("prime_factorization").train_row(0)
    (result,) = scored(row, "a b c", answer_in="text")
    assert result == {"score": 0.0, "unreadable": 1.0}
    broken = {**row.columns["entry"], "metadata": {}, "answer": "nonsense"}
    (error,) = score(["a b c"], [broken], [row.columns["dataset"]], answer_in="text")
    assert isinstance(error, Exception)


def test_answers_that_are_tuples_in_the_entry() -> None:
    row = make("rearc", train_size=2, eval_size=1).train_row(0)
    assert scores(row, str(row.columns["answer"]), answer_in="text") == [1.0]


def test_rows_of_other_tasks_are_skipped() -> None:
    assert score(["x"], [None], [None]) == [None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "countdwn"}, "did you mean countdown"),
        ({"name": "chain_sum", "config": {"max_term": 3}}, "config: chain_sum refuses it"),
        ({"name": "chain_sum", "config": {"min_terms": 9, "max_terms": 2}}, "refuses it"),
        ({"name": "chain_sum", "config": {"seed": 3}}, "config.seed: leave it out"),
        ({"name": "chain_sum", "answer_in": "box"}, "must be one of tags"),
        ({"name": "chain_sum", "answer_in": "text"}, "asks for answer tags"),
        ({"name": "chain_sum", "system": "DeepSekZero"}, "neither one of DeepSeekZero"),
        ({"name": "chain_sum", "train_size": 0}, "from 1 on"),
        ({"name": "chain_sum", "size": 3}, "unknown option"),
        ({}, "task.options.name: required"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        load_task(TaskConfig(name="reasoning_gym", options=options), 0)


def test_datasets_whose_questions_depend_on_the_hash_seed(monkeypatch: Any) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(TaskError, match="PYTHONHASHSEED=0"):
        make("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert make("ransom_note").train_row(0)


def test_too_few_questions_are_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr("cohort.rewards.reasoning_gym._is_held_out", lambda _: True)
    task = make("chain_sum", train_size=2)
    assert task.eval_row(0)
    with pytest.raises(TaskError, match="chain_sum has too few different questions"):
        task.train_row(0)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["9**9**9**9", "x**9**9**9**9", "(" * 90 + "9**9**9" + ")" * 90])
def test_an_answer_without_end_is_wrong(given: str) -> None:
    """It is evaluated where it can be ended; the next answer is scored as before."""
    made_by = {"name": "simple_integration", "config": {}}
    entry = reasoning_gym.create_dataset("simple_integration", seed=0, size=1)[0]
    texts = [f"<answer>{given}</answer>", f"<answer>{entry['answer'].replace('+ C', '')}</answer>"]
    started = time.perf_counter()
    wrong, right = score(texts, [entry] * 2, [made_by] * 2)
    assert time.perf_counter() - started < 20
    assert isinstance(wrong, dict)
    assert wrong["score"] == 0.0
    assert right == {"score": 1.0, "unreadable": 0.0}
