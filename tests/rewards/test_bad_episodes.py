"""Tools, environments and models that behave badly: told to the model, or counted; nothing is lost.

What a `step` returns and what the process does is in test_environments.py; here it is tools.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from episode_table import HOSTILE, Table, at_table_of, call, results
from transformers import AutoTokenizer

from cohort.cluster.commands.check.environment import check_environment
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config

pytestmark = pytest.mark.slow

SAYS = {
    "raises": "KeyError: 'no such hotel'",
    "raises_much": "SystemExit: 3",
    "ten_megabytes": "x" * 100 + "\n[9999900 more characters were left out]",
    "raw": "\ufffd raw",
    "no_number": "NaN",
    "half_a_letter": "?",
    "endless": "[[...]]",
    "nothing": "null",
    "unknown": "error: there is no tool 'unknown'; the tools are",
}
COUNTED = {"raises", "raises_much", "unknown"}


@pytest.mark.parametrize("name", SAYS)
def test_the_model_reads_what_a_tool_did(at_table: Any, name: str) -> None:
    async def body(table: Table) -> None:
        made, other = await asyncio.gather(
            table.play([call(name), "Done."], max_tokens=100, reward=1),
            table.play([call("late", seconds=0.1), "Done."], 1, max_tokens=100, who="me"),
        )
        (said,) = results(made)
        assert SAYS[name] in said
        assert len(said) < 600
        assert made.end is not None
        assert made.end.metrics["tool_errors"] == (name in COUNTED)
        assert made.end.metrics["cut_messages"] == (name == "ten_megabytes")
        assert (made.end.stop_reason, made.end.reward) == ("answered", 1.0)
        assert results(other) == ["me"]

    at_table("Odd", body, message_chars=100 if name == "ten_megabytes" else 1000)


BROKEN = {
    "no JSON": ("<tool_call>{broken</tool_call>", "not valid JSON"),
    "no end": ('<tool_call>{"name": "raw", "arguments": {}', "not valid JSON"),
    "nested too deep": (f"<tool_call>{'[' * 600}</tool_call>", "not valid JSON"),
    "a list": ("<tool_call>[1]</tool_call>", "must be a JSON object with name and arguments"),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', "must be a JSON object with name"),
    "arguments in a list": (
        '<tool_call>{"name": "raw", "arguments": [1]}</tool_call>', "must be a JSON object",
    ),
    "an argument too many": (call("raw", more=1), "unexpected keyword argument 'more'"),
    "an argument too few": (call("late"), "missing a required argument: 'seconds'"),
    "of another type": (call("late", seconds="soon"), "TypeError"),
    "a private method": (call("__init__"), "no tool '__init__'"),
    "the environment's own": (call("reset"), "no tool 'reset'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_the_model_is_told_of_a_broken_call(at_table: Any, what: str) -> None:
    said, words = BROKEN[what]

    async def body(table: Table) -> None:
        made = await table.play([said, call("raw"), "Done."], max_tokens=800)
        first, second = results(made)
        assert words in first
        assert second == "\ufffd raw"
        assert made.end is not None and made.end.metrics["tool_errors"] == 1

    at_table("Odd", body)


def test_a_model_that_never_stops_calling(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play([call("nothing")], max_tokens=100, reward=1)
        assert made.end is not None
        assert made.end.stop_reason == "tool_calls"
        assert made.end.metrics["tool_calls"] == 21
        # As many as are allowed were made, and what was earned is kept.
        assert len(results(made)) == 20
        assert made.end.reward == 1.0
        at_once = await table.play([call("nothing") * 1000], 1, max_tokens=4000)
        assert at_once.end is not None
        assert at_once.end.stop_reason == "tool_calls"
        assert results(at_once) == []

    at_table("Odd", body, max_turns=1000, max_tool_calls=20)


def test_many_slow_calls_do_not_look_like_one_that_hangs(at_table: Any) -> None:
    async def body(table: Table) -> None:
        said = call("late", seconds=0.6) * 8
        made = await table.play([said, "Done."], max_tokens=800, who="me")
        told = results(made)
        assert told[0] == "me"
        assert told[-1].startswith("error: not run, ")
        assert made.end is not None
        assert made.end.metrics["tool_errors"] == len([one for one in told if one != "me"])

    at_table("Odd", body, step_timeout_s=4)


def test_a_tool_that_hangs_costs_its_own_episode(at_table: Any) -> None:
    async def body(table: Table) -> list[int]:
        began = time.monotonic()
        bad, good = await asyncio.gather(
            table.play([call("hangs"), "Done."], max_tokens=100, reward=1),
            table.play([call("late", seconds=1.5), "Done."], 1, max_tokens=100, who="me"),
        )
        assert bad.end is not None and bad.end.failure is not None
        assert "environments.step_timeout_s" in bad.end.failure.message
        assert bad.end.failure.kind == "data"
        assert bad.end.reward is None
        assert len(bad.token_ids) == 0
        assert results(good) == ["me"]
        assert time.monotonic() - began < 20
        process = table.worker._process
        return [] if process is None else [process.pid]

    children = {child.pid for child in psutil.Process().children(recursive=True)}
    at_table("Odd", body, step_timeout_s=3)
    deadline = time.monotonic() + 10
    while {child.pid for child in psutil.Process().children(recursive=True)} - children:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_episode_reads_its_own_answers(at_table: Any) -> None:
    """Many at once, which answer out of order; an answer that comes too late reaches nobody."""

    async def body(table: Table) -> None:
        async def one(index: int) -> None:
            name, waits = f"episode {index}", [(index * k) % 7 / 20 for k in (1, 3, 5)]
            said = [*(call("late", seconds=wait) for wait in waits), "Done."]
            made = await table.play(said, index, max_tokens=100, who=name)
            assert results(made) == [name] * 3

        too_late = table.play([call("late", seconds=4.0), "Done."], 99, max_tokens=100, who="late")
        hung, *_ = await asyncio.gather(too_late, *(one(index) for index in range(40)))
        assert hung.end is not None and hung.end.failure is not None
        # In the meantime its answer comes, if there is anyone who would read it.
        await asyncio.gather(*(one(index) for index in range(100, 110)), asyncio.sleep(1.5))

    at_table("Odd", body, step_timeout_s=3)


def test_an_answer_that_is_garbled_ends_the_process_and_not_the_run(at_table: Any) -> None:
    async def body(table: Table) -> None:
        began = time.monotonic()
        late = call("late", seconds=1.0)
        bad, good = await asyncio.gather(
            table.play([call("garbles")], max_tokens=100),
            table.play([late, late, "Done."], 1, max_tokens=100, who="me"),
        )
        assert bad.end is not None and bad.end.failure is not None
        assert (bad.end.failure.kind, "garbled" in bad.end.failure.message) == ("infra", True)
        # Begun again, in a process without the other: the first call is lost.
        assert results(good) == ["me"]
        assert time.monotonic() - began < 40

    at_table("Odd", body, step_timeout_s=15)


EARLY = {"exits": ("infra", "exited with code 4"), "hangs": ("data", "reset gave no answer within")}


@pytest.mark.parametrize("how", EARLY)
def test_an_environment_that_dies_in_reset(at_table: Any, how: str) -> None:
    kind, words = EARLY[how]

    async def body(table: Table) -> None:
        bad, good = await asyncio.gather(
            table.play([call("raw"), "Done."], max_tokens=100, early=how),
            table.play([call("late", seconds=1.0), "Done."], 1, max_tokens=100, who="me"),
        )
        assert bad.end is not None and bad.end.failure is not None
        assert (bad.end.failure.kind, bad.end.failure.stage) == (kind, "reset")
        assert words in bad.end.failure.message
        assert results(good) == ["me"]

    at_table("Odd", body, step_timeout_s=3)


NO_REWARD = {
    "NaN": (float("nan"), "get_reward returned nan"),
    "a text": ("much", "'much', which is not a number"),
    "infinity": (float("-inf"), "get_reward returned -inf"),
    "a list": ([1.0], "which is not a number"),
}


@pytest.mark.parametrize("what", NO_REWARD)
def test_a_last_reward_that_is_none_is_a_failure(at_table: Any, what: str) -> None:
    value, words = NO_REWARD[what]

    async def body(table: Table) -> None:
        made = await table.play(["Done."], reward=value)
        assert made.end is not None and made.end.failure is not None
        assert words in made.end.failure.message
        assert made.end.reward is None

    at_table("Odd", body)


def test_a_template_without_tools(tiny_model: Path, tmp_path: Path) -> None:
    """It is said before the start, and the tools are described in words."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(model)
    task = {"environment": f"{HOSTILE}:Odd"}
    config = Config.model_validate({"task": task, "model": {"path": str(model)}})
    lines: list[str] = []
    check_environment(config, str(model), tokenizer, Stage(lines.append))
    assert "the model's chat template knows no tools" in "\n".join(lines)

    async def body(table: Table) -> None:
        made = await table.play([call("raw"), "Done."], max_tokens=100)
        assert made.end is not None and made.end.failure is None
        assert made.end.metrics["tool_calls"] == 1
        read = table.tokenizer.decode(table.contexts[1])
        assert json.dumps({"name": "raw"})[1:-1] in read
        assert "\ufffd raw" in read

    at_table_of(model, "Odd", body)
