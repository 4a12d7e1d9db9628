"""Mixtures, their shares, their rewards, and the curriculum that pass rates lead."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt, ScoreMeta
from cohort.rewards.config import RewardFunctionConfig, RewardsConfig, TaskConfig
from cohort.rewards.mixture import BLOCK, MixtureTask, shares
from cohort.rewards.rates import NO_RATES, PassRates, PromptOutcome, Rate, RateHistory, outcome
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import Demonstrates, Row, TaskError, load_task, sample_rows
from cohort.rewards.worker import RewardWorker

SMALL = {"name": "addition", "label": "small", "options": {"max_operand": 4}, "weight": 3}
LARGE = {"name": "addition", "label": "large", "options": {"max_operand": 9}}


def mixture(*tasks: Any, **options: Any) -> MixtureTask:
    config = TaskConfig(name="mixture", options={"tasks": list(tasks), **options})
    task = load_task(config, 0)
    assert isinstance(task, MixtureTask)
    return task


def test_shares_are_exact_and_spread_and_every_part_goes_through_its_epochs() -> None:
    task = mixture(SMALL, LARGE)
    rows = sample_rows(task, 7, 0, 2 * BLOCK)
    assert Counter(row.source for _, row in rows) == {"small": 1500, "large": 500}
    assert {Counter(r.source for _, r in rows[i : i + 8])["small"] for i in range(0, 2000, 8)} <= {
        5,
        6,
        7,
    }
    size = load_task(TaskConfig(options={"max_operand": 4}), 0).train_size()
    small = [(epoch, row.id) for epoch, row in rows if row.source == "small"]
    for epoch in range(1500 // size):
        part = small[epoch * size : (epoch + 1) * size]
        assert {number for number, _ in part} == {epoch}
        assert len({row_id for _, row_id in part}) == size


@pytest.mark.parametrize("chunk", [1, 7, 999])
def test_a_mixture_is_the_same_however_it_is_asked_for(chunk: int) -> None:
    whole = sample_rows(mixture(SMALL, LARGE), 5, 0, 2100)
    parts: list[Any] = []
    task = mixture(SMALL, LARGE)
    for cursor in range(0, 2100, chunk):
        # A new task now and then: as after a restart.
        task = mixture(SMALL, LARGE) if cursor % 500 < chunk else task
        parts += sample_rows(task, 5, cursor, min(chunk, 2100 - cursor))
    assert parts == whole
    assert sample_rows(mixture(SMALL, LARGE), 6, 0, 2100) != whole


def test_shares_add_up_whatever_the_weights() -> None:
    for weights in ([1, 1, 1], [0.1, 0.7, 5], [1e-9, 2e-9], [3]):
        counts = shares(weights)
        assert sum(counts) == BLOCK
        assert all(
            abs(c - BLOCK * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True)
        )
    with pytest.raises(TaskError, match="less than a thousandth"):
        shares([1, 1e-5])


def test_held_out_rows_take_turns_and_stay_apart() -> None:
    task = mixture(SMALL, LARGE)
    held = [task.eval_row(i) for i in range(task.eval_size())]
    assert {row.source for row in held[:4]} == {"small", "large"}
    assert len({row.id for row in held}) == len(held)
    train = {task.train_row(i).id for i in range(task.train_size())}
    assert len(train) == task.train_size()
    with pytest.raises(IndexError):
        task.train_row(task.train_size())


def group_of(row: Row, *texts: str) -> Group:
    completions = tuple(
        Completion(
            f"g/{i}", "p", np.zeros(1, np.int64), np.zeros(1, np.float32), "stop", 0, (0, 0), text
        )
        for i, text in enumerate(texts)
    )
    return Group("g", Prompt("0-r", (1,), row.content, row.columns, source=row.source), completions)


def test_a_row_is_scored_by_its_own_parts_functions_only(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}", "word": str(n)}) + "\n" for n in range(9))
    )
    (tmp_path / "own.py").write_text(
        "def same(completions, word):\n"
        "    return [2.0 * (c == w) for c, w in zip(completions, word)]\n"
    )
    other = {"name": "dataset", "data": str(data), "functions": [f"{tmp_path}/own.py:same"]}
    task = mixture(LARGE, SMALL, other)
    specs = reward_specs(task, RewardsConfig())
    assert [(s.name, s.sources) for s in specs] == [
        ("exact_number", ("large", "small")),
        ("same", ("dataset",)),
    ]
    actor = RewardWorker(specs, timeout_s=20)
    try:
        for label, texts, totals in (("large", None, (1.0, 0.0)), ("dataset", None, (2.0, 0.0))):
            row = next(r for _, r in sample_rows(task, 0, 0, 50) if r.source == label)
            texts = (str(row.columns.get("answer", row.columns.get("word"))), "none")
            meta, _ = actor.score(group_of(row, *texts))
            assert isinstance(meta, ScoreMeta)
            assert meta.errors == ()
            assert meta.totals == totals
            silent = "same" if label == "large" else "exact_number"
            assert meta.by_function[silent] == (None, None)
    finally:
        actor.close()


def test_without_functions_for_every_part_the_config_must_name_them(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "A"}\n{"prompt": "B"}\n')
    task = mixture(LARGE, {"name": "dataset", "data": str(data)})
    with pytest.raises(TaskError, match=r"set rewards.functions .*not for all of its rows"):
        reward_specs(task, RewardsConfig())
    assert reward_specs(task, RewardsConfig(functions=["cohort.rewards.answer:exact_number"]))


def test_a_function_is_the_same_by_its_name_and_by_its_path() -> None:
    task = mixture({**SMALL, "functions": ["cohort.rewards.answer:exact_number"]}, LARGE)
    (spec,) = reward_specs(task, RewardsConfig())
    assert (spec.name, spec.sources) == ("exact_number", ("small", "large"))


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "a list of at least one task"),
        ([LARGE, LARGE], r"tasks\[1\]: another part is called large too"),
        ([{**LARGE, "weight": 0}], r"tasks\[0\]\.weight: .*greater than 0"),
        ([{**LARGE, "wieght": 1}], r"tasks\[0\]\.wieght"),
        ([{**LARGE, "label": "a b"}], "use letters"),
        ([{"name": "additon"}], r"tasks\[0\]: .*did you mean addition"),
        ([{**LARGE, "data": "x.jsonl"}], r"tasks\[0\]: task.data is only read by"),
        ([{"name": "mixture", "options": {"tasks": [LARGE]}}], "cannot be a part"),
        ([{**LARGE, "functions": [{"path": "a:f", "sources": ["x"]}]}], "leave out sources"),
    ],
)
def test_parts_that_cannot_work(tasks: list[Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        mixture(*tasks)


class Graded:
    rewards = (RewardFunctionConfig(path="cohort.rewards.answer:exact_number"),)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def train_size(self) -> int:
        return 2

    def train_row(self, index: int) -> Row:
        return Row(f"r{index}", "Q")

    def eval_size(self) -> int:
        return 2

    def eval_row(self, index: int) -> Row:
        return Row(f"e{index}", "Q")

    def metrics(self, rows: list[Row], completions: list[str]) -> dict[str, float]:
        assert all(row.id.startswith("e") and row.source is None for row in rows)
        return {"mean_length": sum(map(len, completions)) / len(rows)}


def test_a_part_keeps_its_metrics() -> None:
    task = mixture(LARGE, {"name": f"{__file__}:Graded", "label": "graded"})
    rows = [task.eval_row(i) for i in range(4)]
    assert {row.source for row in rows} == {"large", "graded"}
    texts = ["xxx" if row.source == "graded" else "1" for row in rows]
    assert task.metrics(rows, texts) == {"graded/mean_length": 3.0}


# Pass rates


def test_an_outcome_counts_scored_completions() -> None:
    assert outcome("r", "s", [1.0, None, 0.5, 2.0], 1.0) == PromptOutcome("r", "s", 3, 2, 3.5 / 3)
    assert outcome("r", None, [None], 1.0) == PromptOutcome("r", None, 0, 0, None)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_what_a_step_sees_is_what_was_known_so_many_steps_before(delay: int) -> None:
    history = RateHistory(delay)
    for step in range(8):
        count = history.before(step).rows.get("r", Rate(0, 0, 0.0)).scored
        assert count == 4 * max(0, step - delay)
        # A step further ahead, as an overlapped run admits it.
        ahead = history.before(step + delay).sources.get("s", Rate(0, 0, 0.0)).scored
        assert ahead == 4 * step
        saved = json.loads(json.dumps(history.as_dict()))
        assert RateHistory.resumed(saved, delay).before(step) == history.before(step)
        history.record(
            step, [PromptOutcome("r", "s", 4, step % 5, 0.0), PromptOutcome("x", "s", 0, 0, None)]
        )


def test_rates_given_out_do_not_change_later() -> None:
    history = RateHistory(0)
    before = history.before(0)
    history.record(0, [PromptOutcome("r", "s", 4, 1, 0.0)])
    assert before == NO_RATES
    assert history.before(1).rows["r"] == Rate(4, 1, 0.25)


def test_a_curriculum_shifts_to_what_is_sometimes_solved() -> None:
    equal = [{**SMALL, "weight": 1}, LARGE]
    task = mixture(*equal, curriculum=True)

    def share(rates: PassRates) -> float:
        rows = sample_rows(task, 0, 0, BLOCK, rates)
        return Counter(row.source for _, row in rows)["large"] / BLOCK

    def recent(**values: float) -> PassRates:
        return PassRates(sources={name: Rate(8, 4, value) for name, value in values.items()})

    assert share(NO_RATES) == 0.5
    assert share(recent(small=0.95, large=0.4)) == 0.8
    assert share(recent(small=0.5, large=0.01)) == 0.2
    assert share(recent(small=0.1, large=0.8)) == 0.5
    assert share(recent(small=1.0, large=1.0)) == 0.5
    # No row twice in an epoch, whatever the weights do.
    seen = [
        (epoch, row.id)
        for cursor in range(3000)
        for epoch, row in [task.choose(0, cursor, recent(small=cursor % 3 / 2, large=0.4))]
    ]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("delay", [0, 2])
def test_a_resumed_curriculum_draws_what_an_unbroken_one_draws(delay: int) -> None:
    def solved(row_id: str, step: int) -> int:
        easy = row_id.startswith("small")
        return 8 if easy and step > 3 else 3

    def draws(start: int, history: RateHistory, until: int) -> Any:
        """Steps as the loop takes them: admitted `delay` ahead. Saves before step 6."""
        task = mixture({**SMALL, "weight": 1}, LARGE, curriculum=True)
        drawn: dict[int, list[str]] = {}
        saved = None
        for step in range(start, until):
            for ahead in range(step, min(step + delay, until - 1) + 1):
                if ahead not in drawn:
                    rows = sample_rows(task, 3, 16 * ahead, 16, history.before(ahead))
                    drawn[ahead] = [f"{epoch}-{row.id}" for epoch, row in rows]
            found = [name.partition("-")[2] for name in drawn[step]]
            history.record(
                step,
                [PromptOutcome(r, r.partition("/")[0], 8, solved(r, step), 0.0) for r in found],
            )
            if step == 5:
                saved = json.loads(json.dumps(history.as_dict()))
        return drawn, saved

    straight, saved = draws(0, RateHistory(delay), 20)
    resumed, _ = draws(6, RateHistory.resumed(saved, delay), 20)
    assert resumed == {step: names for step, names in straight.items() if step >= 6}
    # The curriculum did something.
    late = Counter(
        name.split("-")[1].split("/")[0] for step in range(14, 20) for name in straight[step]
    )
    assert late["large"] > 2 * late["small"]


def test_each_part_demonstrates_its_own_rows() -> None:
    task = mixture(LARGE, {"name": "travel", "options": {"train_size": 5, "eval_size": 2}})
    assert isinstance(task, Demonstrates)
    rows = [task.train_row(index) for index in range(task.train_size())]
    shown = {row.source: task.demonstration(row, 0) for row in rows}
    last = next(row for row in reversed(rows) if row.source == "large")
    assert shown["large"] == str(last.columns["answer"])
    assert json.loads(shown["travel"] or "")
