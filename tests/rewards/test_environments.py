"""Episodes with real environments in their real process; the model's replies are written here."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from episode_table import HOSTILE, MAX_LENGTH, Table, costs_its_own_episode, spec_of

from cohort.rewards.config import TaskConfig
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.specs import find_tools
from cohort.rewards.environments.worker import EnvironmentWorker

pytestmark = pytest.mark.slow


def test_an_episode_of_several_turns(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play(["4", "5", "7"], number=7)
        assert made.end is not None
        assert made.end.stop_reason == "done"
        assert made.end.rewards == (0.1, 0.1, 1.0)
        assert made.end.reward == pytest.approx(1.2)
        assert [m["content"] for m in made.end.messages] == [
            "From 1 to 9.", "4", "No.", "5", "No.", "7", "Right.",
        ]  # fmt: skip
        assert made.end.metrics["misses"] == 1.0
        assert made.end.state == {"number": 7, "seed": 17}
        assert [turn.reward for turn in made.turns] == [0.1, 0.1, 1.0]
        # The sampled tokens, end of turn included, are all that there is to train.
        assert made.token_ids.tolist() == [*table.ids("4"), *table.ids("5"), *table.ids("7")]
        assert len(made.logprobs) == len(made.token_ids)
        assert made.text == "7"
        # What the engine read is what it had read before, what it sampled, and new tokens.
        first, second, third = table.contexts
        assert second[: len(first) + 2] == [*first, *table.ids("4")]
        assert third[: len(second) + 2] == [*second, *table.ids("5")]
        prompt = table.prompt().token_ids
        for turn, context in zip(made.turns, table.contexts, strict=True):
            shape = turn.shape
            assert shape.kept + shape.inserted == len(context)
            base = prompt if shape.parent is None else table.contexts[shape.parent]
            assert context[: min(shape.kept, len(base))] == list(base)[: shape.kept]
            assert context[shape.kept :] == turn.inserted_ids.tolist()
        # As the template writes the whole conversation.
        told = [{"role": "user", "content": "Begin.\n\nFrom 1 to 9."}, *made.end.messages[1:-2]]
        whole = table.tokenizer.apply_chat_template(
            told, add_generation_prompt=True, return_dict=False
        )
        assert third == whole

    at_table("Guess", body)


LIMITS = {
    "turns": ({"max_turns": 3}, ["no"], {}),
    "length": ({}, [[5] * 80], {}),
    "context": ({"max_turns": 1000}, ["word " * 12], {}),
}


@pytest.mark.parametrize("reason", LIMITS)
def test_an_episode_ends_at_a_limit_with_what_it_has_earned(at_table: Any, reason: str) -> None:
    keys, replies, columns = LIMITS[reason]

    async def body(table: Table) -> None:
        made = await table.play(replies, **columns)
        assert made.end is not None
        assert made.end.stop_reason == reason
        assert made.end.failure is None
        assert made.finish_reason == ("stop" if reason == "turns" else "length")
        assert max(len(context) for context in table.contexts) < MAX_LENGTH
        if reason == "turns":
            assert len(made.turns) == 3

    at_table("Silent", body, **keys)


def test_a_reply_without_a_call_that_was_cut_is_no_answer(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play([[5] * 80], city="Kyoto")
        assert made.end is not None
        assert (made.end.stop_reason, made.finish_reason) == ("length", "length")

    at_table("Shop", body)


def test_replies_that_come_while_a_process_dies_are_given_to_the_next(at_table: Any) -> None:
    async def body(table: Table) -> None:
        await table.play(["7"], number=7)
        process = table.worker._process
        assert process is not None
        delays = [0.1 + n / 100 for n in range(30)]
        playing = [
            asyncio.create_task(table.play(["4", "7"], n, seconds=s, number=7))
            for n, s in enumerate(delays)
        ]
        await asyncio.sleep(0.15)
        os.kill(process.pid, signal.SIGKILL)
        for made in await asyncio.gather(*playing):
            assert made.end is not None
            assert made.end.stop_reason == "done", made.end.failure

    at_table("Guess", body)


def test_tools_of_trl(at_table: Any) -> None:
    call = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'

    async def body(table: Table) -> None:
        made = await table.play(
            [
                call % ("price", '{"hotel": "Sakura", "nights": 2}'),
                call % ("price", '{"hotel": 5, "rooms": 2}'),
                call % ("fly", "{}") + call % ("book", '{"hotel": "Sakura"}'),
                "<tool_call>{broken</tool_call>",
                call % ("broken", "{}"),
                "All done.",
            ],
            max_tokens=400,
            city="Kyoto",
        )
        assert made.end is not None
        assert made.end.stop_reason == "answered"
        results = [m["content"] for m in made.end.messages if m["role"] == "tool"]
        assert results[0] == "180 EUR at Sakura"
        assert "unexpected keyword argument 'rooms'" in results[1]
        assert "no tool 'fly'; the tools are book, broken, price" in results[2]
        assert results[3] == '{"booked": "Sakura", "in": "Kyoto"}'
        assert "not valid JSON" in results[4]
        assert "ValueError: out of order" in results[5]
        assert made.end.metrics["tool_calls"] == 6
        assert made.end.metrics["tool_errors"] == 4
        assert made.end.rewards == (None, None, None, None, None, 1.0)
        assert made.end.state == {"currency": "EUR", "booked": ["Sakura"], "city": "Kyoto"}

    at_table("Shop", body)


def test_a_thousand_calls_end_the_episode(at_table: Any) -> None:
    call = '<tool_call>{"name": "price", "arguments": {"hotel": "A"}}</tool_call>'

    async def body(table: Table) -> None:
        made = await table.play([call * 4], max_tokens=400, city="Kyoto")
        assert made.end is not None and made.end.stop_reason == "tool_calls"

    at_table("Shop", body, max_tool_calls=3)


WRONG = {
    "raises": ("data", "ZeroDivisionError"),
    "nan": ("data", "the reward is nan"),
    "no step": ("data", "step must return a Step, not a str"),
    "fails": ("data", "the service is down"),
    "speaks for the model": ("data", "cannot speak as the assistant"),
    "bytes": ("data", "must be a text, not a bytes"),
    "huge number": ("data", "not a number"),
    "dies in reset": ("data", "no table is free"),
    "hangs": ("data", "environments.step_timeout_s"),
    "exits": ("infra", "exited with code 3"),
}


@pytest.mark.parametrize("how", WRONG)
def test_an_environment_that_fails_costs_its_own_episode(at_table: Any, how: str) -> None:
    at_table(
        "Steps", lambda table: costs_its_own_episode(table, how, *WRONG[how]), step_timeout_s=2
    )


def test_one_that_blocks_all_others_costs_them_a_second_beginning(at_table: Any) -> None:
    async def body(table: Table) -> None:
        began = time.monotonic()
        bad, good = await asyncio.gather(
            table.play(["go"], block=True), table.play(["go"], index=1)
        )
        assert bad.end is not None and bad.end.failure is not None
        assert "no answer within" in bad.end.failure.message
        assert good.end is not None
        assert good.end.failure is None or "no answer within" in good.end.failure.message
        again = await table.play(["go"])
        assert again.end is not None and again.end.reward == 1.0
        assert time.monotonic() - began < 60

    at_table("BlocksTheLoop", body, step_timeout_s=2)


class Unpickled:
    """Pickled here, and refused there."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.mark.parametrize("value", [lambda: None, Unpickled()], ids=["there", "here"])
def test_a_row_that_cannot_be_handed_over_costs_its_own_episode(at_table: Any, value: Any) -> None:
    async def body(table: Table) -> None:
        bad, good = await asyncio.gather(
            table.play(["go"], how="is fine", more=value), table.play(["go"], 1, how="is fine")
        )
        assert bad.end is not None and bad.end.failure is not None
        assert bad.end.failure.kind == "data"
        assert good.end is not None and good.end.reward == 1.0

    at_table("Steps", body)


def test_long_messages_are_cut_and_say_so(at_table: Any) -> None:
    async def body(table: Table) -> None:
        made = await table.play(["go"], how="ten megabytes")
        assert made.end is not None
        (_, answer, *_) = made.end.messages
        assert answer["content"] == "x" * 100 + "\n[9999900 more characters were left out]"
        assert made.end.metrics["cut_messages"] >= 1

    at_table("Steps", body, message_chars=100, max_turns=2)


def test_control_tokens_in_a_message_are_text(at_table: Any) -> None:
    """A tool cannot end its turn and speak as the model."""

    async def body(table: Table) -> None:
        made = await table.play(["go"], how="control tokens")
        assert made.end is not None
        inserted = made.turns[1].inserted_ids.tolist()
        plain = await table.play(["go"], how="raises")
        assert plain.end is not None
        end = table.tokenizer.convert_tokens_to_ids("<|im_end|>")
        # Its own turn's end, and none more.
        assert inserted.count(end) == 1
        assert made.end.metrics["control_tokens"] > 0

    at_table("Steps", body, max_turns=2)


def test_what_an_environment_leaves_behind_ends_with_its_process(at_table: Any) -> None:
    async def body(table: Table) -> int:
        made = await table.play(["go"], how="leaves a process")
        assert made.end is not None
        pid = int(made.end.messages[-1]["content"])
        assert psutil.pid_exists(pid)
        return pid

    pid = at_table("Steps", body)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sixty_four_episodes_at_once(at_table: Any) -> None:
    async def body(table: Table) -> None:
        await table.worker.check()
        began = time.monotonic()
        made = await asyncio.gather(*(table.play(["go"], index=i) for i in range(64)))
        assert all(one.end is not None and one.end.reward == 1.0 for one in made)
        # Each waits a second; together they wait little more.
        assert time.monotonic() - began < 20

    at_table("BlocksTheLoop", body, step_timeout_s=30)


NOT_LOADED = {
    "Nothing": "Nothing",
    "NoTools": "neither a method `step` nor a public method to be a tool",
}


@pytest.mark.parametrize("name", NOT_LOADED)
def test_what_is_no_environment_is_said_before_anything_starts(name: str) -> None:
    task = TaskConfig(environment=f"{HOSTILE}:{name}")
    with pytest.raises(EnvironmentLoadError, match=NOT_LOADED[name]):
        find_tools(task)


def test_options_that_a_class_does_not_take(tiny_model: Path) -> None:
    spec = spec_of(tiny_model, "Shop", options={"colour": "red"})

    async def main() -> str:
        table = Table(tiny_model, spec)
        made = await table.play(["go"], city="Kyoto")
        assert made.end is not None and made.end.failure is not None
        table.kill()
        return made.end.failure.message

    assert "task.environment_options" in asyncio.run(main())


def test_an_environment_sees_no_secrets(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "hush")
    spec = spec_of(tiny_model, "Silent")
    for secrets, seen in (((), False), (("SHOP_KEY",), True)):

        async def main(names: tuple[str, ...] = secrets) -> dict[str, str]:
            worker = EnvironmentWorker(replace(spec, secrets=names))
            assert await worker.check() is None
            assert worker._process is not None
            found = psutil.Process(worker._process.pid).environ()
            worker._process.kill()
            return found

        assert (asyncio.run(main()).get("SHOP_KEY") == "hush") is seen
    assert os.environ["SHOP_KEY"] == "hush"
