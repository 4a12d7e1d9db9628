"""Held-out scores during a run, and the best checkpoint by them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from cohort.cluster.evaluation import Evaluation, HeldOut
from cohort.learner.checkpoint import load_state
from tests.harness.world import World

MakeWorld = Callable[..., World]


def scores(patch: pytest.MonkeyPatch, by_step: dict[str, float]) -> None:
    """Have the evaluations of these steps come out so."""
    real = HeldOut.score

    async def score(self: HeldOut, pool: Any, rewards: Any, name: str = "") -> Evaluation:
        found = await real(self, pool, rewards, name)
        wanted = by_step[name.rstrip(":")]
        return Evaluation(**{**found.__dict__, "greedy_reward": wanted})

    patch.setattr(HeldOut, "score", score)


def kept(run: World) -> set[str]:
    return {path.name for path in (run.folder / "checkpoints").glob("step-*")}


def test_an_evaluation_is_recorded_with_its_step_and_changes_nothing_else(world: MakeWorld) -> None:
    plain, run = world("plain", run__steps=5), world(run__steps=5, run__evaluate_every=2)
    assert plain.train() == 0
    assert run.train() == 0
    for row, other in zip(run.rows(), plain.rows(), strict=True):
        assert ("eval/greedy_reward" in row) == (row["step"] in (1, 3))
        assert row["reward/mean"] == other["reward/mean"]
        assert row["samples/admitted"] == other["samples/admitted"]
    assert [w.tobytes() for w in run.weights().values()] == [
        w.tobytes() for w in plain.weights().values()
    ]
    # With the weights of its step: training has moved them in between.
    first, second = (run.rows()[step]["eval/sampled_reward"] for step in (1, 3))
    assert first != second


def test_the_best_checkpoint_is_kept_and_named(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, {"1": 0.1, "2": 0.7, "3": 0.5, "4": math.nan, "5": 0.7, "6": 0.2})
    run = world(run__steps=6, run__evaluate_every=1, run__checkpoint_every=1)
    assert run.train(run__keep_checkpoints=2) == 0
    assert kept(run) == {"step-2", "step-5", "step-6"}
    best = run.folder / "checkpoints" / "best"
    assert best.resolve().name == "step-2"
    assert load_state(best)["best"] == {"step": 2, "score": 0.7}


def test_a_resumed_run_knows_the_best_so_far(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, {"1": 0.9, "2": 0.5, "3": 0.8, "4": 0.95})
    run = world(run__steps=4, run__evaluate_every=1, run__keep_checkpoints=1)
    run.on("step", lambda _: run.stop(), nth=2)
    run.train()
    run.forget_hooks()
    best = run.folder / "checkpoints" / "best"
    assert best.resolve().name == "step-1"
    assert run.train(run__resume=True) == 0
    assert best.resolve().name == "step-4"
    assert kept(run) == {"step-4"}


def test_an_evaluation_that_fails_does_not_end_the_run(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cohort.cluster.errors import RunError

    async def fails(*_: Any, **__: Any) -> None:
        raise RunError("no engine answers")

    monkeypatch.setattr(HeldOut, "score", fails)
    run = world(run__steps=3, run__evaluate_every=1)
    assert run.train() == 0
    assert "evaluation after step 1 failed, training goes on: no engine" in capsys.readouterr().out


def test_a_stop_does_not_wait_for_an_evaluation(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(*_: Any, **__: Any) -> None:
        run.stop()
        await asyncio.sleep(1e6)

    monkeypatch.setattr(HeldOut, "score", hangs)
    run = world(run__steps=3, run__evaluate_every=1)
    run.train()
    assert run.state()["step"] == 1
    assert run.time < 1000
