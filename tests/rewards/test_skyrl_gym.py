"""Environments of the real skyrl-gym, in their process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from episode_table import HOSTILE

from tests import needs

pytestmark = [pytest.mark.slow, needs.package("skyrl_gym")]

SUM = {"reward_spec": {"method": "rule", "ground_truth": "5"}}


def test_turns_of_gsm8k(at_table: Any) -> None:
    """Its own format rewards, its own words between the turns, its own limit of turns."""

    async def body(table: Any) -> None:
        made = await table.play(["I think 4", "#### 4", "#### 5"], max_tokens=200, **SUM)
        assert made.end.failure is None, made.end.failure
        assert made.end.stop_reason == "answered"
        assert made.end.rewards == (0.0, pytest.approx(0.2 / 4), 1.0)
        assert made.end.metrics["steps"] == 3
        said = [m["content"] for m in made.end.messages if m["role"] == "user"]
        assert len(said) == 2 and said[0].startswith("Please provide your step-by-step reasoning")
        given_up = await table.play(["no"], max_tokens=200, **SUM)
        assert len(given_up.turns) == 4 and given_up.end.reward == 0.0
        last = [m["content"] for m in given_up.end.messages if m["role"] == "user"][-1]
        assert last.startswith("Now provide only the final numeric answer")
        # A column of the row goes before the option.
        short = await table.play(["no"], max_tokens=200, max_turns=2, **SUM)
        assert len(short.turns) == 2

    options = {"env": "gsm8k_multi_turn", "extras": {"max_turns": 4}}
    at_table("skyrl_gym", body, options=options, step_timeout_s=30)


def test_one_turn_of_aime(at_table: Any) -> None:
    async def body(table: Any) -> None:
        right, wrong = await asyncio.gather(
            table.play(["Answer: 7"], reward_model={"ground_truth": "7"}),
            table.play(["Answer: 8"], 1, reward_model={"ground_truth": "7"}),
        )
        assert (right.end.reward, wrong.end.reward) == (1.0, -1.0)
        assert (right.end.metrics["acc"], wrong.end.metrics["acc"]) == (1.0, 0.0)
        missing = await table.play(["Answer: 7"])
        assert "reward_model field is required" in missing.end.failure.message

    at_table("skyrl_gym", body, options={"env": "aime"}, step_timeout_s=30)


def test_an_environment_of_the_users_own(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play(["a</stop> b", "go"], said="Welcome.")
        assert made.end.failure is None, made.end.failure
        assert [m["content"] for m in made.end.messages] == [
            "Welcome.", "a</stop> b", "Your config is red.", "go",
        ]  # fmt: skip
        # What was sampled is what is trained.
        assert made.end.metrics["postprocessed"] == 1.0
        assert made.token_ids.tolist() == [*table.ids("a</stop> b"), *table.ids("go")]
        rewritten = await table.play(["go"], said=None)
        assert "init rewrites the row's prompt" in rewritten.end.failure.message

    options = {"env": f"{HOSTILE}:SkyRLText", "config": {"colour": "red"}}
    at_table("skyrl_gym", body, options=options, step_timeout_s=30)


WRONG = {"No registered env with id: chess": "chess", "no 'Chess' in": f"{HOSTILE}:Chess"}


@pytest.mark.parametrize("message", WRONG)
def test_an_environment_that_is_not_there(tiny_model: Path, message: str) -> None:
    from episode_table import spec_of

    from cohort.rewards.environments.worker import EnvironmentWorker

    async def main() -> str | None:
        worker = EnvironmentWorker(
            spec_of(tiny_model, "skyrl_gym", options={"env": WRONG[message]})
        )
        try:
            return await worker.check()
        finally:
            if worker._process is not None:
                worker._process.kill()

    assert message in str(asyncio.run(main()))
