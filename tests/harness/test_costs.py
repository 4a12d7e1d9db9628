"""What things cost, in the run's own time: overlap hides generation, a fault costs what it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.engine import START_S
from tests.harness.learner import STEP_S
from tests.harness.world import World

MakeWorld = Callable[..., World]


def test_generation_hides_behind_training_when_steps_overlap(world: MakeWorld) -> None:
    slow = {"rollout-0": 6.0, "rollout-1": 6.0}
    times = []
    for staleness in (0, 1):
        run = world(f"staleness-{staleness}", run__steps=6, actors__max_staleness=staleness)
        run.slow = slow
        assert run.train() == 0
        rows = run.rows()[2:]
        times.append([row["time/step"] for row in rows])
    synchronous, overlapped = (sum(found) / len(found) for found in times)
    # Engines that are slower than the learner set the pace, and its time is hidden behind theirs.
    assert overlapped < synchronous - 0.9 * STEP_S


def test_two_nodes_share_the_weights_and_the_work(world: MakeWorld) -> None:
    run = world(run__steps=3)
    run.nodes = 2
    assert run.train() == 0
    nodes = {run.ray.find(f"rollout-{index}").node for index in range(2)}
    assert len(nodes) == 2
    for row in run.rows():
        assert row["mismatch/logprob_abs_max"] < 1e-4
    updates = {event.actor: event.what for event in run.events("update")}
    [shared] = [path for path in updates.values() if "cohort-learner" in path]
    [copied] = [path for path in updates.values() if "cohort-rollout" in path]
    assert shared != copied


@pytest.mark.parametrize("count", [1, 2])
def test_a_dead_engine_costs_its_start_and_no_more(world: MakeWorld, count: int) -> None:
    run = world(run__steps=4, actors__count=count)
    run.on("call", lambda e: run.ray.kill(e.actor), actor="rollout-0", what="collect", nth=6)
    assert run.train() == 0
    times = [row["time/step"] for row in run.rows()]
    usual, longest = sorted(times)[1], max(times)
    assert run.rows()[-1]["actors/restarts"] == 1
    if count == 1:
        assert longest < usual + START_S + 5
    else:
        # The other engine takes over; the new one joins when it is up.
        assert longest < usual + 5


@pytest.mark.parametrize(("what", "count"), [("collect", 2), ("collect", 1), ("sync", 2)])
def test_a_frozen_engine_is_found_in_15_seconds(world: MakeWorld, what: str, count: int) -> None:
    """At default settings. One of two is not even waited for in an update."""
    run = world(run__steps=6, actors__count=count)
    frozen_at: list[float] = []

    def freeze(event: object) -> None:
        frozen_at.append(event.time)  # type: ignore[attr-defined]
        run.ray.freeze("rollout-0")

    run.on("call", freeze, actor="rollout-0", what=what, nth=4)
    assert run.train() == 0
    [death] = [event for event in run.events("dead", actor="rollout-0")][:1]
    assert death.time - frozen_at[0] < 15
    times = [row["time/step"] for row in run.rows()]
    usual, longest = sorted(times)[1], max(times)
    assert run.rows()[-1]["actors/restarts"] == 1
    assert run.rows()[-1]["samples/failed"] == 0
    costs = {("collect", 2): 15.0, ("collect", 1): 15.0 + START_S + 2, ("sync", 2): 5.0}
    assert longest < usual + costs[what, count]


def test_a_slow_engine_is_not_a_dead_one(world: MakeWorld) -> None:
    # A token takes longer than half of the timeout, a group twice the timeout and more.
    run = world(run__steps=2, actors__group_timeout_s=10)
    run.on("call", lambda _: run.ray.slow.update({"rollout-1": 120.0}), what="submit", nth=1)
    assert run.train() == 0
    assert run.rows()[-1]["actors/restarts"] == 0
    assert max(row["time/generate"] for row in run.rows()) > 20
