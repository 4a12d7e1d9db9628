"""`cohort check` as a user runs it, with a real engine on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import Cohort

pytestmark = pytest.mark.system


def test_a_check_with_an_engine(
    cohort: Cohort, nothing_left: Callable[[], None], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = cohort.arguments("check", run__dir=run, rewards__functions="[judge.py:digits]")
    result = cohort.run(*arguments, "--prompts", "3")
    text = result.stdout + result.stderr
    assert result.returncode == 0, text
    assert "3 prompts x 4 completions" in text
    assert "rewards of the 12 completions" in text
    assert "digits  mean" in text
    assert "groups without signal (all rewards equal):" in text
    assert "This run can start" in text
    # A random model seldom ends before 12 tokens.
    assert "truncated at actors.max_tokens=12" in text
    assert not run.exists()
    nothing_left()


def test_a_reward_that_raises_ends_it_before_an_engine_starts(
    cohort: Cohort, nothing_left: Callable[[], None], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = cohort.run(
        *cohort.arguments("check", run__dir=run, rewards__functions="[judge.py:raises]")
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "RuntimeError: the judge is out to lunch" in result.stdout
    assert "not tried, because of the problems above" in result.stdout
    assert "This run could not work: 1 problem." in result.stdout
    assert not run.exists()
    nothing_left()
