"""How many actors a run wants: pure, step by step."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest

from cohort.actors.demand import WINDOW, Demand


def simulate(demand: Demand, steps: int, actors: int, need: float) -> list[int]:
    """The number of actors after each step, of a learner that `need` of them just keep busy."""
    counts = []
    for _ in range(steps):
        waited = max(0.0, need / actors - 1)
        actors = demand.after(1 + waited, waited, actors, joining=False)
        counts.append(actors)
    return counts


@pytest.mark.parametrize("need", [0.5, 1, 3, 5.2, 13, 40])
@pytest.mark.parametrize("start", [1, 4, 16])
def test_it_settles_where_the_learner_is_busy(need: float, start: int) -> None:
    counts = Counter(simulate(Demand(1, 16), 200, start, need)[-100:])
    settled, steps = counts.most_common(1)[0]
    # Within a quarter of the time that the learner may wait.
    assert min(16, max(1, math.ceil(need * 0.75))) <= settled <= min(16, math.ceil(need) + 1)
    # A number that was too few is tried now and then.
    assert steps >= 80
    assert set(counts) <= {settled, settled - 1}


def test_it_is_tried_again_after_a_while_whether_fewer_do() -> None:
    demand = Demand(1, 8)
    busy = simulate(demand, 60, 1, 8)
    assert busy[-1] >= 6
    # Completions became short: the learner never waits.
    quiet = simulate(demand, 200, busy[-1], 0.5)
    assert quiet[-1] == 1
    assert all(a - b in (0, 1) for a, b in pairwise(quiet))


def test_the_bounds_hold_and_newcomers_are_waited_for() -> None:
    demand = Demand(2, 3)
    assert demand.after(1, 1, actors=1, joining=False) == 2
    assert demand.after(1, 0, actors=9, joining=False) == 3
    for _ in range(5 * WINDOW):
        assert demand.after(1, 1, actors=2, joining=True) == 2
    counts = [demand.after(1, 1, actors=2, joining=False) for _ in range(WINDOW)]
    assert counts == [2] * (WINDOW - 1) + [3]
