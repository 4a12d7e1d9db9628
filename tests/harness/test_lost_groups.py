"""Groups that are lost after they were scored, with the machine that held them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cohort.learner.learner import LostGroups
from tests.harness.world import World

MakeWorld = Callable[..., World]


def lose(count: int) -> Callable[[Any], None]:
    """Lose this many of the groups that a rank is about to train."""

    def action(event: Any) -> None:
        for ref in event.detail["args"][1][:count]:
            ref.lose()

    return action


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_lost_before_they_are_trained_come_from_the_journal(
    world: MakeWorld, ranks: int, staleness: int
) -> None:
    run = world(run__steps=4, learner__workers=ranks, actors__max_staleness=staleness)
    run.on("call", lose(1), actor=f"learner-{ranks - 1}", what="step", nth=2)
    assert run.train() == 0
    rows = run.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["samples/failed"] == 0
    # Each completion is trained once, and every step has applied.
    steps = run.events("step", actor="learner-0")
    assert len(steps) == 4
    trained = run.trained()
    assert len(trained) == len(set(trained))
    assert rows[-1]["weights/version"] == 4
    assert len(asked(run)) == len(set(asked(run))) == 16


def asked(run: World) -> list[str]:
    """The groups that engines were asked for."""
    calls = [event for event in run.events("call") if event.what == "submit"]
    return [request.group_id for call in calls for request in call.detail["args"][0]]


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_lost_before_they_are_written_are_generated_again(
    world: MakeWorld, staleness: int
) -> None:
    run = world(run__steps=4, actors__max_staleness=staleness)
    run.on("call", lambda event: event.detail["args"][4][0].lose(), what="put_group", nth=6)
    assert run.train() == 0
    assert [row["samples/failed"] for row in run.rows()] == [0] * 4
    assert len(run.trained()) == len(set(run.trained())) == 4 * 16
    assert len(asked(run)) == 17


def test_groups_that_are_lost_each_time_end_the_run_in_words(world: MakeWorld) -> None:
    run = world(run__steps=4, learner__workers=1)
    run.on("call", lose(1), actor="learner-0", what="step")
    with pytest.raises(LostGroups, match=r"the completions of 0:.* are gone"):
        run.train()
    assert not run.events("step")
