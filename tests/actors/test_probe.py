"""The probe's limits: from the first update's gap, and between two versions."""

from __future__ import annotations

import pytest

from cohort.actors.probe import Probe, limit_of, probe_gap, stale


def probe(*logprobs: float, floor: float | None = 0.01) -> Probe:
    return Probe([1, 2, 3], list(logprobs), tolerance=0.5, floor=floor)


@pytest.mark.parametrize(
    ("first_gap", "floor", "limit"),
    [
        (None, 0.01, 0.5),
        (0.004, 0.01, 0.02),
        (4e-7, 0.01, 0.01),
        (0.3, 0.01, 0.5),
        # Given by the user: taken as it is.
        (0.004, None, 0.5),
    ],
)
def test_the_limit_follows_the_first_gap(
    first_gap: float | None, floor: float | None, limit: float
) -> None:
    assert limit_of(probe(-1, -2, floor=floor), first_gap) == pytest.approx(limit)


def test_an_engine_nearer_to_the_version_before_is_stale_where_that_can_be_told() -> None:
    before, now = probe(-1.0, -2.0), probe(-1.2, -2.2)
    assert stale(now, before, [-1.01, -2.01], gap=0.01)
    assert not stale(now, before, [-1.19, -2.21], gap=0.01)
    # The versions are no further apart than engines are from the learner anyway.
    assert not stale(now, before, [-1.01, -2.01], gap=0.06)
    assert not stale(now, None, [-1.01, -2.01], gap=0.01)
    assert not stale(now, now, [-1.01, -2.01], gap=0.0)


def test_a_gap_needs_equally_many_tokens() -> None:
    assert probe_gap([-1.0, -2.0], [-1.5, -1.0]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shorter"):
        probe_gap([-1.0, -2.0], [-1.0])
