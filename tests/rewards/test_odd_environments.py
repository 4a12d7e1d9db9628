"""Environments that are slow, name things as we do, or return more than they should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from episode_table import Table, at_table_of, call, costs_its_own_episode, results, spec_of
from transformers import AutoTokenizer

from cohort.rewards.config import TaskConfig
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.specs import gives_rewards
from cohort.rewards.environments.worker import try_environment
from tests.templates import FOLDER

pytestmark = pytest.mark.slow

ODD = Path(__file__).parent / "odd_environments.py"


@pytest.mark.parametrize("name", ["Slow", "SlowTool"])
@pytest.mark.parametrize("thinks", [0.0, 1.1], ids=["in an answer", "while the model writes"])
def test_time_that_is_up_ends_an_episode_with_what_it_has_earned(
    at_table: Any, name: str, thinks: float
) -> None:
    async def body(table: Table) -> None:
        # What is earned in the answer that is under way counts, too.
        made = await table.play([call("wait")], max_tokens=100, seconds=thinks, takes=0.6)
        assert made.end is not None and made.end.failure is None, made.end
        assert made.end.stop_reason == "time"
        assert made.end.reward == len(made.turns) * (0.5 if name == "Slow" else 1.0)

    at_table(f"{ODD}:{name}", body, episode_timeout_s=1, step_timeout_s=5)


def test_arguments_and_columns_may_have_names_of_ours(at_table: Any) -> None:
    async def body(table: Table) -> None:
        said = [call("differentiate", function="x"), "Done."]
        made = await table.play(said, max_tokens=100, function="f", seed=12345)
        assert results(made) == ["the derivative of x"]
        assert made.end is not None and made.end.state == {"function": "f", "seed": 12345}
        other = await table.play(["Done."], 1)
        assert other.end is not None and other.end.state == {"function": "", "seed": 17}

    at_table(f"{ODD}:OurNames", body)


ENDS = {
    "": ("Done.", "reset get_reward close "),
    "get_reward": ("Done.", "reset get_reward close "),
    # No reward is asked for where nobody would read it.
    "reset": ("Done.", "reset close "),
    "fails": (call("fails"), "reset close "),
}


@pytest.mark.parametrize("raises", ENDS)
def test_an_environment_is_closed_however_its_episode_ends(
    at_table: Any, tmp_path: Path, raises: str
) -> None:
    said, notes = ENDS[raises]
    diary = tmp_path / "diary"

    async def body(table: Table) -> None:
        made = await table.play([said], max_tokens=100, raises=raises)
        assert made.end is not None
        assert (made.end.failure is None) == (raises == "")
        assert diary.read_text() == notes

    at_table(f"{ODD}:Diary", body, options={"path": str(diary)})


def test_metrics_of_an_environment_replace_none_of_ours(at_table: Any) -> None:
    async def body(table: Table) -> None:
        theirs = {"tool_calls": 0, "turns": 99, "stop/done": 7, "forks": 5, "mood": 1, "none": None}
        made = await table.play([call("t") * 3], max_tokens=300, metrics=theirs)
        assert made.end is not None and made.end.failure is None, made.end
        # The limit still holds, and ids of calls are given once.
        assert made.end.stop_reason == "tool_calls"
        assert [m["content"] for m in made.end.messages if m["role"] == "user"] == ["call00000"]
        assert made.end.metrics == {
            "tool_calls": 6, "tool_errors": 0, "cut_messages": 0, "control_tokens": 0, "forks": 0,
            "inexact": made.end.metrics["inexact"],
            "environment/tool_calls": 0, "environment/turns": 99, "environment/stop/done": 7,
            "environment/forks": 5, "mood": 1,
        }  # fmt: skip

    at_table(f"{ODD}:Metrics", body, max_turns=6, max_tool_calls=4)


@pytest.mark.parametrize("wrong", [{str(n): n for n in range(65)}, {"x" * 101: 1}])
def test_metrics_have_few_and_short_names(at_table: Any, wrong: dict[str, float]) -> None:
    async def body(table: Table) -> None:
        made = await table.play([call("t")], max_tokens=100, metrics=wrong)
        assert made.end is not None and made.end.failure is not None
        assert made.end.failure.message.startswith("Step.metrics: ")
        assert made.end.metrics["tool_calls"] == 1

    at_table(f"{ODD}:Metrics", body)


RAISES = ("panic", "interrupt", "cancelled", "stop")


def test_whatever_a_tool_raises_the_model_is_told(at_table: Any) -> None:
    async def body(table: Table) -> None:
        said = [call(name, what=what) for what in RAISES for name in ("raises", "raises_async")]
        made = await table.play(["".join(said), "Done."], max_tokens=1000)
        told = results(made)
        assert len(told) == len(said)
        for text in told:
            assert text.startswith("error: ")
            # Of a coroutine Python says no more.
            assert "dear me" in text or "coroutine raised StopIteration" in text
        assert made.end is not None and made.end.metrics["tool_errors"] == len(said)

    at_table(f"{ODD}:RaisingTools", body)


@pytest.mark.parametrize("how", RAISES)
def test_whatever_a_step_raises_costs_its_own_episode(at_table: Any, how: str) -> None:
    at_table(f"{ODD}:OddSteps", lambda table: costs_its_own_episode(table, how, "data", "dear me"))


UNBOUNDED = {
    "too many": "1001 messages at once; an answer has 1000 at most",
    "too long": "bytes; 67108864 are read at most",
    "fails": "xxx",
    # Two of them in a group, and their mean or their spread overflows.
    "large reward": "the reward is -1.1e+30, not a finite number within ±1e+30",
    "large metric": "metrics[m] is 1e+308, not a finite number within ±1e+30",
}


@pytest.mark.parametrize("how", UNBOUNDED)
def test_an_answer_without_bound_costs_its_own_episode(at_table: Any, how: str) -> None:
    async def body(table: Table) -> None:
        await costs_its_own_episode(table, how, "data", UNBOUNDED[how])
        made = await table.play(["go"], 2, how=how)
        assert made.end is not None and made.end.failure is not None
        assert len(made.end.failure.message) <= 2000

    at_table(f"{ODD}:OddSteps", body, step_timeout_s=20)


def test_names_in_messages_are_short_texts(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play(["go"], how="names")
        assert made.end is not None and made.end.failure is None
        said = made.end.messages[-1]
        assert (said["name"], said["tool_call_id"]) == ("x" * 200, "b'ab'")

    at_table(f"{ODD}:OddSteps", body)


def test_a_last_reward_has_the_bound_of_scores(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play(["Done."], reward=1e30)
        assert made.end is not None and made.end.reward == 1e30
        made = await table.play(["Done."], 1, reward=1.1e30)
        assert made.end is not None and made.end.failure is not None
        assert "get_reward returned 1.1e+30, not a finite" in made.end.failure.message

    at_table(f"{ODD}:LastReward", body)


def test_steps_and_the_end_both_give_rewards(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play(["a", "b"], takes=0)
        assert made.end is not None and made.end.failure is None
        assert made.end.rewards == (0.5, 10.5)

    at_table(f"{ODD}:AskedAtTheEnd", body, max_turns=2)


GIVES = {"Slow": True, "NoReward": False, "LastReward": True, "make_slow": True}


@pytest.mark.parametrize("name", GIVES)
def test_tools_without_a_reward_are_known(name: str) -> None:
    assert gives_rewards(TaskConfig(environment=f"{ODD}:{name}")) == GIVES[name]


@pytest.mark.parametrize(("name", "gives"), [("mcp", False), ("sandbox", False), ("openenv", True)])
def test_tools_of_ours_give_no_reward(name: str, gives: bool) -> None:
    assert gives_rewards(TaskConfig(environment=name)) == gives


NOT_MADE = {
    "NoReset": "has `step` and no `reset`",
    "make_no_reset": "has `step` and no `reset`",
    "make_tools": "name their class, SlowTool, in its place",
    "partly": "name their class, SlowTool, in its place",
    "make_slow": "",
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_could_not_play_well_is_refused_before_anything_starts(
    tiny_model: Path, name: str
) -> None:
    def tried() -> None:
        try_environment(spec_of(tiny_model, f"{ODD}:{name}"))

    if not NOT_MADE[name]:
        return tried()
    with pytest.raises(EnvironmentLoadError, match=NOT_MADE[name]):
        tried()


@pytest.mark.parametrize("history", ["append", "template"])
def test_what_the_template_would_have_written_otherwise_is_counted(
    tiny_model: Path, tmp_path: Path, history: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # It drops what was thought before.
    tokenizer.chat_template = (FOLDER / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(model)

    async def body(table: Table) -> None:
        replies = ["<think>\nlet me see\n</think>\n\n4", "5"]
        made = await table.play(replies, max_tokens=100, takes=0)
        assert made.end is not None and made.end.failure is None
        counted = [made.end.metrics[name] for name in ("inexact", "forks")]
        assert counted == ([1, 0] if history == "append" else [0, 1])

    at_table_of(model, f"{ODD}:Slow", body, max_turns=2, history=history)
