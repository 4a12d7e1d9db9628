"""What the warm-up learns from, in which order, and what it refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cohort.cluster.cli import app
from cohort.cluster.commands.demonstrations import as_group, demonstrations
from cohort.cluster.commands.warmup import (
    WarmUp,
    check_overrides,
    held_out_loss,
    run_warmup,
    warmup_config,
)
from cohort.cluster.config import ConfigError
from cohort.cluster.config_file import load_config
from cohort.cluster.evaluation import task_metrics
from cohort.cluster.lengths import Lengths
from cohort.cluster.prepare import Prepared, RunError
from cohort.learner.checkpoint import CheckpointError, new_folder
from cohort.rewards.tasks import AdditionTask, Demonstrates, PromptRenderer, Row, TaskError
from cohort.rewards.travel.task import TravelTask
from tests.models import CHAT_TEMPLATE, END, tiny_tokenizer

ADDITION = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "addition.yaml"
GIVEN = WarmUp(steps=3, batch_size=2, learning_rate=1e-4)
TOKENIZER = tiny_tokenizer()


class Sparse(AdditionTask):
    """Shows an answer to every other row only."""

    def demonstration(self, row: Row, epoch: int) -> Any:
        return f"{row.columns['answer']} {epoch}" if row.columns["answer"] % 2 else None


class Silent(AdditionTask):
    def demonstration(self, row: Row, epoch: int) -> Any:  # noqa: ARG002
        return None


class Wrong(AdditionTask):
    def demonstration(self, row: Row, epoch: int) -> Any:  # noqa: ARG002
        return row.columns["answer"]


class Mute:
    """A task without the method."""

    def __init__(self) -> None:
        task = AdditionTask(0)
        self.rewards = task.rewards
        self.train_size, self.train_row = task.train_size, task.train_row
        self.eval_size, self.eval_row = task.eval_size, task.eval_row


def prepared(task: Any, *overrides: str, longest: int | None = 500) -> Prepared:
    config = warmup_config(load_config(ADDITION, ["model.path=m", *overrides]), GIVEN)
    return Prepared(config, "m", 1, task, [], PromptRenderer(TOKENIZER, longest), Lengths(0, 64, 0))


def taken(given: Prepared, count: int, examples: int = 0) -> list[Any]:
    return [item.ref.group for item in groups(given, count, examples)]


def groups(given: Prepared, count: int, examples: int = 0) -> list[Any]:
    shown = islice(demonstrations(given, examples), count)
    return [asyncio.run(as_group(one)) for one in shown]


def texts(groups: list[Any]) -> list[tuple[str, str]]:
    return [(group.id, group.completions[0].text) for group in groups]


def test_a_demonstration_is_what_the_model_would_generate() -> None:
    """Prompt and answer together are the conversation as the chat template writes it."""
    for group in taken(prepared(AdditionTask(0)), 20):
        [completion] = group.completions
        answer = str(group.prompt.columns["answer"])
        messages = [*group.prompt.content, {"role": "assistant", "content": answer}]
        whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
        assert whole == TOKENIZER.decode([*group.prompt.token_ids, *completion.token_ids]) + "\n"
        assert TOKENIZER.decode(completion.token_ids) == answer + END
        assert CHAT_TEMPLATE.count(END) == 1
        assert completion.token_ids[-1] == TOKENIZER.eos_token_id
        assert math.isnan(completion.logprobs[0])


def test_every_epoch_holds_each_training_row_once_in_an_order_of_its_own() -> None:
    task = AdditionTask(0)
    size = task.train_size()
    ids = [group.prompt.id.split("-") for group in taken(prepared(task), 2 * size)]
    rows = {task.train_row(index).id for index in range(size)}
    first, second = ([row for _, row in part] for part in (ids[:size], ids[size:]))
    assert set(first) == set(second) == rows
    assert first != second
    assert {epoch for epoch, _ in ids[:size]} == {"0"}
    assert {epoch for epoch, _ in ids[size:]} == {"1"}
    assert rows.isdisjoint(task.eval_row(index).id for index in range(task.eval_size()))


def test_the_order_is_a_function_of_the_seed() -> None:
    one = texts(taken(prepared(AdditionTask(0)), 90))
    assert one == texts(taken(prepared(AdditionTask(0)), 90))
    assert one != texts(taken(prepared(AdditionTask(0), "run.seed=1"), 90))


def test_few_examples_come_back() -> None:
    found = texts(taken(prepared(AdditionTask(0)), 12, examples=3))
    assert len({group_id for group_id, _ in found}) == 12  # ids differ by their epoch
    assert len({group_id.split("-")[1] for group_id, _ in found}) == 3
    # A travel query has several answers: another one each time.
    task = TravelTask(0, train_size=2, eval_size=1)
    plans = texts(taken(prepared(task, "actors.max_tokens=400"), 12, examples=1))
    assert len({text for _, text in plans}) > 1


def test_rows_without_a_demonstration_are_passed_over() -> None:
    found = taken(prepared(Sparse(0)), 100)
    assert all(group.prompt.columns["answer"] % 2 for group in found)
    assert {text.split()[1] for _, text in texts(found)} >= {"0", "1"}


@pytest.mark.parametrize("task", [Silent(0), Mute()])
def test_a_task_without_demonstrations(task: Any) -> None:
    with pytest.raises(TaskError, match=r"task\.name=addition has no demonstrations.*method"):
        taken(prepared(task), 1)
    assert not isinstance(Mute(), Demonstrates)


def test_a_demonstration_that_is_no_text() -> None:
    with pytest.raises(TaskError, match=r"must be a text, a list .* got \d+"):
        taken(prepared(Wrong(0)), 1)


def test_too_long() -> None:
    keys = ("actors.max_tokens=1",)
    with pytest.raises(TaskError, match=r"has \d tokens, more than actors\.max_tokens=1"):
        taken(prepared(AdditionTask(0), *keys), 1)
    # An answer and the end are two tokens at least.
    with pytest.raises(TaskError, match="no demonstrations"):
        taken(prepared(AdditionTask(0), *keys, "task.overlong=drop"), 1)
    with pytest.raises(TaskError, match="no demonstrations"):
        taken(prepared(AdditionTask(0), "task.overlong=drop", longest=5), 1)


def test_the_learner_gets_the_numbers_of_the_warm_up() -> None:
    base = load_config(ADDITION, ["model.path=m", "algorithm.preset=dapo", "learner.zero_stage=2"])
    config = warmup_config(base, GIVEN)
    assert config.algorithm.objective == "cross_entropy"
    assert config.algorithm.contradictions() == []
    assert (config.run.steps, config.learner.learning_rate) == (3, 1e-4)
    assert (config.learner.zero_stage, config.actors.temperature) == (2, 1.0)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="--learning-rate must be above 0"):
            warmup_config(base, WarmUp(1, 1, rate))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=3", "use --steps"),
        ("--learner.learning-rate=1", "use --learning-rate"),
        ("task.prompts_per_step=4", "use --batch-size"),
        ("algorithm.kl_coef=0.1", "plain cross-entropy"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(override: str, message: str) -> None:
    check_overrides(["learner.workers=2", "run.seed=3"])
    with pytest.raises(ConfigError, match=message):
        check_overrides([override])


def test_training_refuses_the_objective_of_the_warm_up() -> None:
    for command in (["train"], ["eval"]):
        keys = ["model.path=m", "algorithm.objective=cross_entropy"]
        result = CliRunner().invoke(app, [*command, str(ADDITION), *keys])
        assert result.exit_code == 2
        assert "cohort warmup" in result.stderr


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    config = load_config(ADDITION, ["model.path=/nowhere"])
    # Before anything else is looked at: the model does not exist either.
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        asyncio.run(run_warmup(config, GIVEN, tmp_path / "out"))
    assert (tmp_path / "out" / "mine").read_text() == "x"
    with pytest.raises(CheckpointError, match="mine is not a writable directory"):
        asyncio.run(run_warmup(config, GIVEN, tmp_path / "out" / "mine" / "deep" / "model"))


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(OSError, match="full"), new_folder(out) as folder:
        (folder / "half").write_text("x")
        raise OSError("full")
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "whole").write_text("x")
        assert list(out.iterdir()) == []
    assert [path.name for path in out.parent.rglob("*")] == ["out", "whole"]


class Learner:
    """Scores every token after the first with minus its id / 100."""

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return [-token / 100 for token in token_ids[1:]]


def test_held_out_loss_is_over_demonstration_tokens_alone() -> None:
    found = groups(prepared(AdditionTask(0)), 5)
    ids = [int(t) for item in found for t in item.ref.group.completions[0].token_ids]
    loss = asyncio.run(held_out_loss(Learner(), found))  # type: ignore[arg-type]
    assert loss == pytest.approx(sum(ids) / len(ids) / 100)
    assert math.isnan(asyncio.run(held_out_loss(Learner(), [])))  # type: ignore[arg-type]


# cohort eval


class Measured(AdditionTask):
    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        right = [str(r.columns["answer"]) == c for r, c in zip(rows, completions, strict=True)]
        return {"exact": sum(right) / len(right)}


def test_metrics_of_the_task_are_over_all_completions_of_each_row() -> None:
    task = Measured(0)
    rows = [task.eval_row(0), task.eval_row(1)]
    answers = [str(row.columns["answer"]) for row in rows]
    assert task_metrics(task, rows, [[answers[0], "x"], ["x", "x"]]) == {"exact": 0.25}
    assert task_metrics(task, rows, [[answers[0]], [answers[1]]]) == {"exact": 1.0}
    assert task_metrics(AdditionTask(0), rows, [["1"], ["2"]]) == {}
    with pytest.raises(RunError, match=r"(?s)Measured\.metrics failed.*ZeroDivisionError"):
        task_metrics(task, [], [])


def test_travel_reports_the_published_metrics() -> None:
    task = TravelTask(0)
    rows = [task.eval_row(index) for index in range(3)]
    good = [task.demonstration(row, 0) for row in rows]
    found = task_metrics(task, rows, [[text, "no plan"] for text in good])
    assert found["delivery_rate"] == found["final_pass_rate"] == found["hard_macro"] == 0.5
    assert set(found) >= {"commonsense_micro", "commonsense_macro", "hard_micro"}
