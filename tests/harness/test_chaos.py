"""Deaths, freezes and lost objects: nothing is lost, nothing is trained twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.exceptions import OutOfMemoryError

from tests.harness.world import Chaos, World
from tests.pace import some

MakeWorld = Callable[..., World]


def check_books(run: World, steps: int) -> None:
    """What must hold of every run that ended well, whatever happened in it."""
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(steps))
    last = rows[-1]
    accounted = last["samples/trained"] + last["samples/filtered"] + last["samples/failed"]
    assert last["samples/admitted"] == accounted == steps * 16
    trained = run.trained()
    assert len(set(trained)) == len(trained) == last["samples/trained"]
    versions = [row["weights/version"] for row in rows]
    assert versions == list(range(1, steps + 1))
    staleness = run.config().actors.max_staleness
    for row in rows:
        assert row["async/staleness_max"] <= staleness
        for sample in run.rollouts(row["step"]):
            assert sample["weight_versions"][0] >= row["step"] - staleness


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (0, 2))]
)
def test_hundreds_of_steps_with_engines_that_die_freeze_and_lose(
    world: MakeWorld, seed: int
) -> None:
    run = world(run__steps=120, actors__max_staleness=seed, actors__max_concurrent=16)
    chaos = Chaos(run, seed, actors=("rollout",), kill=0.0015, freeze=0.0005, out_of_memory=0.0005)
    assert run.train() == 0
    assert len(chaos.done) > 5
    assert run.rows()[-1]["actors/restarts"] > 3
    check_books(run, 120)
    assert run.rows()[-1]["samples/failed"] == 0


@pytest.mark.parametrize("seed", some(range(6), 6, 3))
def test_a_run_survives_random_faults(world: MakeWorld, seed: int) -> None:
    run = world(
        run__steps=40,
        actors__max_staleness=seed % 3,
        actors__count=2 + seed % 2,
        actors__max_concurrent=16,
    )
    chaos = Chaos(run, seed, kill=0.002, freeze=0.0005, out_of_memory=0.001, lose=0.003)
    assert run.train() == 0
    assert len(chaos.done) > 5
    check_books(run, 40)


@pytest.mark.parametrize("method", ["score_part", "score"])
def test_a_reward_call_that_dies_is_made_again(world: MakeWorld, method: str) -> None:
    run = world(run__steps=3)
    run.on("call", lambda event: run.ray.kill(event.actor), what=method, nth=3)
    assert run.train() == 0
    check_books(run, 3)
    assert run.rows()[-1]["samples/failed"] == 0


def test_one_reward_worker_serves_every_call(world: MakeWorld) -> None:
    run = world(run__steps=3, rewards__workers=1)
    assert run.train() == 0
    check_books(run, 3)
    assert len([e for e in run.events("done", actor="reward-0") if e.what == "score"]) == 12


def test_the_only_reward_worker_that_freezes_is_replaced_in_time(world: MakeWorld) -> None:
    run = world(run__steps=3, rewards__workers=1)
    run.on("call", lambda event: run.ray.freeze(event.actor), what="score", nth=5)
    assert run.train() == 0
    check_books(run, 3)
    assert run.rows()[-1]["samples/failed"] == 0
    # Whole: starts of 20 s and 5 s, 3 steps, and 15 s at most to find it.
    assert run.time < 60


def test_an_engine_killed_for_memory_is_replaced(world: MakeWorld) -> None:
    run = world(run__steps=3)
    full = OutOfMemoryError("killed by Ray's memory monitor")
    run.on("call", lambda e: run.ray.kill(e.actor, full), actor="rollout-1", what="collect", nth=2)
    assert run.train() == 0
    check_books(run, 3)
    assert run.rows()[-1]["actors/restarts"] == 1


def test_an_engine_that_ignores_an_update_is_noticed_at_that_update(world: MakeWorld) -> None:
    run = world(run__steps=6)

    def ignore(event: object) -> None:
        event.reply = "ignore"  # type: ignore[attr-defined]

    run.on("update", ignore, actor="rollout-0", nth=3)
    with pytest.raises(Exception, match="rollout-0"):
        run.train()
    # The third update follows the second step; what was learned until then is saved.
    assert [row["step"] for row in run.rows()] == [0, 1]
    assert run.state()["step"] == 2


def test_a_slow_step_says_what_it_waits_for(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=1, actors__max_concurrent=16)
    run.on("call", lambda e: run.ray.slow.update({e.actor: 1000.0}), what="collect")
    run.on("done", lambda e: run.ray.slow.update({e.actor: 1.0}), what="collect")
    assert run.train() == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "without an end" in line]
    assert notes and "step 0: 120 s" in notes[0]
    assert "waiting for completions of 0:" in notes[0]
