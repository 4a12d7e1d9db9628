"""The scripts of examples/, as they stand, on the real stack."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import Cohort
from tests.system.runs import rollouts, rows

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: object, mark: str) -> str:
    """What the script prints, run from the repository's root."""
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COHORT_TEST": mark},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loop_runs(cohort: Cohort, tiny_model: Path, nothing_left: Callable[[], None]) -> None:
    keys = (f"model.path={tiny_model}", "model.dtype=float32", "actors.kv_cache_gib=0.25")
    printed = run("grpo_loop.py", "run.steps=1", *keys, mark=cohort.mark)
    assert re.search(r"^step 0  reward [\d.]+  loss [+-][\d.]+$", printed, re.M), printed
    nothing_left()


@pytest.mark.exhaustive
def test_the_loop_learns_addition(cohort: Cohort, nothing_left: Callable[[], None]) -> None:
    fast = ("learner.learning_rate=1e-4", "actors.max_tokens=8")
    printed = run("grpo_loop.py", "run.steps=4", *fast, mark=cohort.mark)
    rewards = [float(found) for found in re.findall(r"^step \d+  reward ([\d.]+)", printed, re.M)]
    assert len(rewards) == 4
    assert statistics.mean(rewards[2:]) > statistics.mean(rewards[:2]) + 0.2, rewards
    nothing_left()


@pytest.mark.exhaustive
def test_a_game_of_several_turns(cohort: Cohort, nothing_left: Callable[[], None]) -> None:
    """Every token that is trained was sampled, with the log-prob that the learner finds too."""
    folder = cohort.folder / "game"
    # The real model: a made-up one seldom ends a reply.
    keys = (f"run.dir={folder}", "run.steps=1", "model.dtype=float32", "environments.max_turns=3")
    few = ("task.prompts_per_step=2", "task.group_size=4", "learner.learning_rate=3e-5")
    printed = run("guess_number.py", *keys, *few, mark=cohort.mark)
    assert "done: 1 steps" in printed
    for step, row in enumerate(rows(folder)):
        assert row["episodes/turns"] > 1
        assert row["mismatch/logprob_abs_max"] < 5e-3
        assert row["samples/failed"] == 0
        for sample in rollouts(folder, step):
            episode = sample["episode"]
            turns = episode["turns"]
            assert sum(turn["tokens"] for turn in turns) == len(sample["token_ids"])
            said = [m for m in episode["messages"] if m["role"] == "assistant"]
            assert len(said) == len(turns)
            # Each turn continues the whole of the one before.
            at = sample["prompt_tokens"]
            for turn in turns:
                assert turn["kept"] == at
                at += len(turn["inserted_ids"]) + turn["tokens"]
    nothing_left()


@pytest.mark.exhaustive
def test_an_agent_with_its_own_loop(cohort: Cohort, nothing_left: Callable[[], None]) -> None:
    """Its requests are the turns, and every token that is trained was sampled for one of them."""
    folder = cohort.folder / "agent"
    keys = (f"run.dir={folder}", "run.steps=1", "model.dtype=float32", "actors.max_tokens=8")
    few = ("task.prompts_per_step=4", "task.group_size=8", "learner.learning_rate=1e-4")
    printed = run("own_agent.py", *keys, *few, mark=cohort.mark)
    assert "done: 1 steps" in printed
    # Compared with something: some of the replies are right.
    assert rows(folder)[-1]["samples/trained"] > 0
    for step, row in enumerate(rows(folder)):
        assert row["mismatch/logprob_abs_max"] < 5e-3
        assert row["samples/failed"] == row["episodes/forks"] == 0
        for sample in rollouts(folder, step):
            episode = sample["episode"]
            assert episode["stop_reason"] in ("done", "length")
            turns = episode["turns"]
            assert sum(turn["tokens"] for turn in turns) == len(sample["token_ids"])
            answered = turns[-1]["reward"] > 0
            assert len(turns) == (round(3 - 3 * turns[-1]["reward"]) + 1 if answered else 3)
            at = sample["prompt_tokens"]
            for turn in turns:
                assert turn["kept"] == at
                at += len(turn["inserted_ids"]) + turn["tokens"]
    nothing_left()


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["custom_reward.py", "custom_task.py"])
def test_a_run_with_something_of_ones_own(
    script: str, cohort: Cohort, tiny_model: Path, nothing_left: Callable[[], None]
) -> None:
    folder = cohort.folder / script
    keys = (f"run.dir={folder}", "run.steps=2", f"model.path={tiny_model}", "model.dtype=float32")
    printed = run(script, *keys, "actors.kv_cache_gib=0.25", mark=cohort.mark)
    assert "done: 2 steps" in printed
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    nothing_left()
