"""A learner rank dies or freezes: the run goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cohort.learner.ranks import LearnerError
from tests.harness.world import World
from tests.pace import some

MakeWorld = Callable[..., World]
# Where a rank can be: loading the model, a step, copying its state, publishing, saving, and, after
# its death, taking its copy.
STAGES = {
    "setup": ("setup", "", 1),
    "first publish": ("publish", "", 1),
    "first step": ("step", "", 1),
    "step": ("step", "", 3),
    "keep": ("keep", "", 2),
    "publish": ("publish", "", 3),
    "probe": ("call", "logprobs", 3),
    "save": ("save", "", 1),
}
SAME = ("reward/mean", "learner/loss", "learner/grad_norm", "samples/trained", "weights/version")


def same(run: World, straight: World) -> None:
    """The run recorded and holds, to the bit, what the undisturbed one does."""
    assert {n: w.tobytes() for n, w in run.weights().items()} == {
        n: w.tobytes() for n, w in straight.weights().items()
    }
    for mine, other in zip(run.rows(), straight.rows(), strict=True):
        assert [mine[key] for key in SAME] == [other[key] for key in SAME]


@pytest.mark.parametrize("stage", some(STAGES, 3))
@pytest.mark.parametrize(
    ("ranks", "victim"), [(1, 0), pytest.param(2, 0, marks=pytest.mark.exhaustive), (2, 1)]
)
def test_a_ranks_death_in_any_stage_changes_nothing(
    world: MakeWorld, stage: str, ranks: int, victim: int
) -> None:
    keys = dict(run__steps=4, run__checkpoint_every=2, learner__workers=ranks)
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0
    kind, what, nth = STAGES[stage]
    # Publishing is rank 0's work: the others die beside it.
    actor = "learner-0" if kind == "publish" else f"learner-{victim}"
    run.on(
        kind, lambda _: run.ray.kill(f"learner-{victim}"), actor=actor, what=what or None, nth=nth
    )
    assert run.train() == 0
    same(run, straight)
    dead = [event.actor for event in run.events("dead", actor="learner")]
    assert f"learner-{victim}" in dead
    in_start = stage == "setup"
    assert run.rows()[-1]["learner/restarts"] == (0 if in_start else 1)


def test_engines_stay_while_the_ranks_are_started_again(world: MakeWorld) -> None:
    run = world(run__steps=4, actors__max_staleness=1)
    run.on("step", lambda _: run.ray.kill("learner-0"), nth=2)
    assert run.train() == 0
    # Each was made once.
    assert len([actor for actor in run.ray.actors if actor.name.startswith("rollout")]) == 2
    assert run.rows()[-1]["actors/restarts"] == 0
    assert [row["weights/version"] for row in run.rows()] == [1, 2, 3, 4]


def test_a_frozen_rank_is_found_named_and_ended(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = dict(run__steps=3, learner__workers=2)
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0
    undisturbed = straight.time
    run.on("step", lambda _: run.ray.freeze("learner-1"), actor="learner-1", nth=2)
    assert run.train() == 0
    same(run, straight)
    assert "rank 1 is frozen" in capsys.readouterr().out
    # Found within 15 s, started again as at the beginning.
    assert run.time - undisturbed < 15 + 3 * 5 + 10


def test_a_slow_rank_is_not_a_frozen_one(world: MakeWorld) -> None:
    run = world(run__steps=2, learner__workers=2)
    run.slow["learner-1"] = 60.0
    assert run.train() == 0
    assert run.rows()[-1]["learner/restarts"] == 0


def test_a_rank_that_computes_without_answering_is_not_frozen(world: MakeWorld) -> None:
    run = world(run__steps=2, learner__workers=2)
    run.slow |= {"learner-1": 60.0, "learner-1 pulse": 90.0}
    assert run.train() == 0
    assert run.rows()[-1]["learner/restarts"] == 0


def test_deaths_one_after_another_cost_one_step_each(world: MakeWorld) -> None:
    keys = dict(run__steps=6, learner__workers=2)
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0
    for nth, victim in ((2, 0), (3, 1), (6, 1)):
        run.on("step", kill(run, victim), actor="learner-0", nth=nth)
    run.on("call", kill(run, 0), actor="learner-1", what="restore", nth=1)
    assert run.train() == 0
    same(run, straight)
    assert run.rows()[-1]["learner/restarts"] == 4


def test_all_ranks_at_once_cost_one_step(world: MakeWorld) -> None:
    keys = dict(run__steps=4, learner__workers=2)
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0

    def kill_all(_: Any) -> None:
        kill(run, 0)(_)
        kill(run, 1)(_)

    run.on("step", kill_all, actor="learner-0", nth=3)
    assert run.train() == 0
    same(run, straight)
    assert run.rows()[-1]["learner/restarts"] == 1


def test_the_owner_of_the_memory_is_started_again(world: MakeWorld) -> None:
    keys = dict(run__steps=5, learner__workers=2)
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0
    run.on("step", lambda _: run.ray.kill("home-0"), actor="learner-0", nth=2)
    run.on("step", kill(run, 1), actor="learner-0", nth=4)
    assert run.train() == 0
    same(run, straight)
    assert run.rows()[-1]["learner/restarts"] == 1


def test_a_rank_that_dies_again_and_again_ends_the_run(world: MakeWorld) -> None:
    run = world(run__steps=4, run__checkpoint_every=1)
    run.on("step", lambda event: run.ray.kill("learner-0") if event.detail["number"] == 2 else None)
    with pytest.raises(LearnerError, match="learner rank 0"):
        run.train()
    assert run.state()["step"] == 2
    run.forget_hooks()
    assert run.train(run__resume=True) == 0


def test_without_a_copy_the_run_ends_and_says_how_it_goes_on(world: MakeWorld) -> None:
    run = world(run__steps=4, run__checkpoint_every=1, learner__keep_copy=False)
    run.on("step", kill(run, 0), nth=3)
    with pytest.raises(LearnerError, match=r"learner.keep_copy.*run.resume=true"):
        run.train()
    assert run.state()["step"] == 2


def test_a_damaged_copy_is_not_used(world: MakeWorld) -> None:
    run = world(run__steps=4, run__checkpoint_every=1)

    def damage(_: Any) -> None:
        run.ray.kill("learner-0")
        [*files] = Path(run.run.learner.spec.shm_dir).rglob("state-0.pt")
        for file in files:
            data = bytearray(file.read_bytes())
            data[100] ^= 1
            file.write_bytes(data)

    run.on("step", damage, nth=3)
    with pytest.raises(LearnerError, match="damaged"):
        run.train()
    assert run.state()["step"] == 2


def kill(run: World, rank: int) -> Callable[[Any], None]:
    return lambda _: run.ray.kill(f"learner-{rank}")
