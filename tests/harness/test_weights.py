"""Whole runs whose engines do not load what they were told to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cohort.actors.slot import RolloutError
from tests.harness.world import World

MakeWorld = Callable[..., World]


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_update_that_an_engine_ignores_ends_the_run_at_that_update(
    world: MakeWorld, staleness: int
) -> None:
    # The probe sees nothing: it would take a thousand such steps.
    run = world(run__steps=6, learner__learning_rate=1e-7, actors__max_staleness=staleness)
    run.on("update", lambda event: setattr(event, "reply", "ignore"), actor="rollout-1", nth=3)
    with pytest.raises(RolloutError, match=r"rollout-1 .* does not serve what was published"):
        run.train()
    # The learner does not wait for an update that the next step does not need.
    assert len(run.events("publish")) == 3 + staleness
    # The step after which it failed is recorded, with a gap that is not known.
    assert run.rows()[-1]["mismatch/probe_gap"] is None
    assert run.rows()[-2]["mismatch/probe_gap"] < 1e-4


def test_nothing_is_trained_after_an_engine_was_found_with_wrong_weights(world: MakeWorld) -> None:
    """Though nobody waited for its update, and the others have what the next step needs."""
    run = world(run__steps=8, actors__max_staleness=1)
    # Rewards set the pace: the update is found wrong while the next step waits for them.
    run.slow = {"reward-0": 50.0, "reward-1": 50.0}
    run.on("update", lambda event: setattr(event, "reply", "ignore"), actor="rollout-1", nth=3)
    with pytest.raises(RolloutError, match=r"rollout-1 .* does not serve what was published"):
        run.train()
    [third] = [e.time for e in run.events("update", actor="rollout-1")][2:3]
    assert max(e.time for e in run.events("step")) < third + 0.1


def test_one_number_that_is_another_ends_the_run(world: MakeWorld) -> None:
    run = world(run__steps=4)

    def spoil(event: object) -> None:
        def later() -> None:
            weights = event.detail["engine"].weights  # type: ignore[attr-defined]
            weights["head"][7] = np.nextafter(weights["head"][7], np.float32(9))

        run.sleep_until(0.0, later)

    run.on("update", spoil, actor="rollout-0", nth=2)
    with pytest.raises(RolloutError, match=r"1 of 2 layers .* \(others\): head"):
        run.train()
    assert len(run.events("publish")) == 2
