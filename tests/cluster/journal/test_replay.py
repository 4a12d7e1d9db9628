"""Where a replay begins, and what it is refused for."""

from __future__ import annotations

import pytest

from cohort.cluster.commands.replay import Compared, Plan, Range, plan_replay, spans, table
from cohort.cluster.errors import RunError
from cohort.cluster.journal.history import History
from cohort.cluster.journal.records import StepRecord


def history(*steps: int) -> History:
    return History(steps={step: StepRecord(step, ()) for step in steps})


@pytest.mark.parametrize(
    ("steps", "checkpoints", "asked", "plan"),
    [
        (range(8), [3, 6], ":", Plan(0, 0, 8)),
        (range(8), [3, 6], "5:", Plan(3, 5, 8)),
        (range(8), [3, 6], "6:7", Plan(6, 6, 7)),
        (range(8), [3, 6], ":4", Plan(0, 0, 4)),
        # The oldest steps are removed.
        (range(3, 8), [3, 6], ":", Plan(3, 3, 8)),
        (range(4, 8), [3, 6], ":", Plan(6, 6, 8)),
        # A gap.
        ([0, 1, 5, 6], [5], ":", Plan(0, 0, 2)),
        ([0, 1, 5, 6], [5], "5:", Plan(5, 5, 7)),
    ],
)
def test_a_replay_begins_at_the_nearest_checkpoint_before(
    steps: list[int], checkpoints: list[int], asked: str, plan: Plan
) -> None:
    assert plan_replay(history(*steps), checkpoints, Range.parse(asked)) == plan


@pytest.mark.parametrize(
    ("steps", "checkpoints", "asked", "message"),
    [
        ([], [], ":", "holds no step that was trained"),
        (
            [4, 5],
            [3],
            ":",
            "there are checkpoints of 3 steps, and the journal holds the steps 4 to",
        ),
        ([4, 5], [], "4:", "checkpoints of no steps"),
        ([0, 1, 3], [], "0:4", "does not hold step 2: it holds the steps 0 to 1, 3"),
        ([0, 1], [], "5:", "no step 5: the journal holds the steps 0 to 1"),
        ([0, 1], [], "0:5", "does not hold step 2"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    steps: list[int], checkpoints: list[int], asked: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        plan_replay(history(*steps), checkpoints, Range.parse(asked))


@pytest.mark.parametrize("text", ["3", "a:b", "4:4", "5:4", "1:2:3", "-1:"])
def test_steps_that_are_no_range_are_refused(text: str) -> None:
    with pytest.raises(RunError, match="--steps"):
        Range.parse(text)


def test_the_table() -> None:
    rows = [Compared(3, 4, "a" * 32, "a" * 32), Compared(4, 4, "a" * 32, "b" * 32)]
    lines = table([*rows, Compared(5, 4, None, "b" * 32)])
    assert [line.split()[-1] for line in lines[1:4]] == ["equal", "DIFFERENT", "recorded"]
    assert lines[-1] == "3 steps: 1 equal, 1 different, 1 not recorded"
    assert spans([4, 2, 3, 7]) == "2 to 4, 7"
