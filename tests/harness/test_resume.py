"""Stopped, killed and continued: what a checkpoint holds, and what is trained after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cohort.learner.checkpoint import load_state
from tests.harness.world import World
from tests.pace import some

MakeWorld = Callable[..., World]

TIMES = ("time/", "learner/tokens_per_s", "rollout/tokens_per_s")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def drawn(run: World, steps: range) -> list[list[tuple[str, int]]]:
    """Of each step, what was asked and with which seeds."""
    return [[(row["completion_id"], row["seed"]) for row in run.rollouts(step)] for step in steps]


def same_weights(one: World, other: World) -> bool:
    pairs = zip(one.weights().values(), other.weights().values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_identical(world: MakeWorld, ranks: int) -> None:
    straight = world("straight", run__steps=6, learner__workers=ranks)
    parted = world("parted", learner__workers=ranks)
    assert straight.train() == 0
    assert parted.train(run__steps=3) == 0
    assert parted.train(run__steps=6, run__resume=True) == 0
    assert without_times(parted.rows()) == without_times(straight.rows())
    for step in range(6):
        fields = ("completion_id", "token_ids", "reward", "seed", "weight_versions")
        ours, theirs = parted.rollouts(step), straight.rollouts(step)
        assert [[r[f] for f in fields] for r in ours] == [[r[f] for f in fields] for r in theirs]
    assert same_weights(parted, straight)


@pytest.mark.parametrize("staleness", some([1, 2, 4], 3))
def test_an_overlapped_run_resumes_with_the_prompts_and_seeds_that_were_next(
    world: MakeWorld, staleness: int
) -> None:
    keys = {"run__steps": 9, "actors__max_staleness": staleness}
    straight, parted = world("straight", **keys), world("parted", **keys)
    assert straight.train() == 0
    # Stopped after three steps, when the prompts of later steps have been drawn already.
    parted.on("step", lambda _: parted.stop(), nth=3)
    parted.train()
    assert parted.state()["step"] == 3
    assert parted.state()["cursor"] == 12
    parted.forget_hooks()
    assert parted.train(run__resume=True) == 0
    assert drawn(parted, range(9)) == drawn(straight, range(9))
    # Nothing is drawn twice.
    names = [name for step in drawn(parted, range(9)) for name, _ in step]
    assert len(set(names)) == len(names) == 9 * 16


def test_every_checkpoint_of_an_overlapped_run_holds_its_own_steps_cursor(
    world: MakeWorld,
) -> None:
    run = world(run__steps=6, run__checkpoint_every=1, run__keep_checkpoints=9)
    assert run.train(actors__max_staleness=2) == 0
    for step in range(1, 7):
        state = load_state(run.folder / "checkpoints" / f"step-{step}")
        assert (state["step"], state["cursor"]) == (step, 4 * step)


STAGES = {
    "first publish": ("call", "publish", 1),
    "generation": ("call", "submit", 3),
    "scoring a part": ("call", "score_part", 5),
    "training": ("call", "step", 4),
    "load of weights": ("call", "sync", 6),
    "save": ("call", "save", 1),
    "after the ranks have saved": ("done", "save", 1),
    "preparing a save": ("call", "prepare_save", 2),
    "the writing of a copy": ("call", "write", 2),
    "after it is written": ("done", "write", 2),
}


@pytest.mark.parametrize("stage", some(STAGES, 6))
def test_a_driver_killed_at_any_stage_resumes_bit_identical(world: MakeWorld, stage: str) -> None:
    keys = {"run__steps": 5, "run__checkpoint_every": 2, "actors__count": 1, "rewards__workers": 1}
    straight, killed = world("straight", **keys), world("killed", **keys)
    assert straight.train() == 0
    kind, what, nth = STAGES[stage]
    killed.on(kind, lambda _: os.kill(os.getpid(), signal.SIGKILL), what=what, nth=nth)
    assert killed.train_in_child() == -signal.SIGKILL
    killed.forget_hooks()
    assert killed.train_in_child(run__resume=True) == 0
    assert without_times(killed.rows()) == without_times(straight.rows())
    assert drawn(killed, range(5)) == drawn(straight, range(5))
    assert same_weights(killed, straight)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_stopped_run_saves_and_goes_on(world: MakeWorld, staleness: int) -> None:
    run = world(run__steps=9, actors__max_staleness=staleness)
    run.on("step", lambda _: os.kill(os.getpid(), signal.SIGTERM), nth=4)
    assert run.train_in_child() == 128 + signal.SIGTERM
    steps = run.state()["step"]
    assert steps == 4
    assert [row["step"] for row in run.rows()] == list(range(steps))
    assert run.state()["cursor"] == 4 * steps
    run.forget_hooks()
    assert run.train(run__resume=True) == 0
    assert [row["step"] for row in run.rows()] == list(range(9))
    assert len(set(name for step in drawn(run, range(9)) for name, _ in step)) == 9 * 16
