"""What a run that goes on takes from its journal, and what it must not take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cohort.actors.records import Request, SamplingSpec, ScoredRef
from cohort.cluster.journal.actor import Limits
from cohort.cluster.journal.history import History, read_history
from cohort.cluster.journal.journal import Journal
from cohort.cluster.journal.records import Head, Place, StepRecord
from cohort.cluster.journal.writer import JournalWriter
from tests.cluster.journal.made import failure, group_record, same
from tests.harness.local_ray import LocalRay
from tests.harness.world import in_cluster

HEAD = Head({}, threads=1)


@pytest.mark.parametrize(
    ("steps", "done", "goes_on"),
    [
        ([], 0, True),
        ([], 7, True),
        ([0, 1, 2], 0, True),
        ([0, 1, 2], 2, True),
        ([0, 1, 2], 3, True),
        # The newest records are of a future that led on from steps that are not there.
        ([3, 4], 2, False),
        ([0, 1, 3], 1, False),
        ([0, 1, 3], 3, True),
    ],
)
def test_a_journal_goes_on_from_a_checkpoint_only_without_a_gap(
    steps: list[int], done: int, goes_on: bool
) -> None:
    history = History(steps={step: StepRecord(step, ()) for step in steps})
    assert history.goes_on_from(done) is goes_on


def test_steps_come_back_as_recorded_and_later_groups_as_far_as_they_are_there() -> None:
    steps = {step: StepRecord(step, ((f"{step}:a", Place(1, step)),)) for step in (1, 2)}
    groups = {
        # Of recorded steps the record counts: what else was scored was not trained.
        step: {f"{step}:a": Place(1, step), f"{step}:b": Place(1, 10 * step)}
        for step in (0, 1, 2, 3, 5)
    }
    found = History(steps, {}, groups).ahead_of(1)
    assert found == {1: steps[1], 2: steps[2], 3: groups[3], 5: groups[5]}


def request(step: int, seed: int, **prompt: object) -> Request:
    record = group_record(step, "0-1", seed)
    asked = replace(record.scored.group.prompt, **prompt)  # type: ignore[arg-type]
    return Request(f"{step}:0-1", asked, SamplingSpec(8, 1.0, 2, seed), step=step)


def test_a_group_is_put_back_for_the_very_request_it_answers(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, HEAD)
    writer.append(group_record(0, "0-1", 5))
    place = writer.append(group_record(1, "0-1", 6))
    writer.append(StepRecord(0, (), (failure("0:0-1"),)))
    writer.close()

    async def main(_: LocalRay) -> None:
        past = read_history(tmp_path)
        journal = Journal(tmp_path, HEAD, Limits(1, False), past, 0, print)
        assert journal.recall(request(0, 5)) == failure("0:0-1")[1]
        assert journal.recall(request(1, 7)) is None
        assert journal.recall(request(1, 6, token_ids=(5, 6))) is None
        assert journal.recall(replace(request(1, 6), group_id="1:other")) is None
        found = journal.recall(request(1, 6))
        assert isinstance(found, ScoredRef)
        record = group_record(1, "0-1", 6)
        assert same((found.meta, found.scores), (record.meta, record.scores))
        assert same(await found.ref, record.scored)  # type: ignore[misc]
        assert past.groups[1] == {"1:0-1": place}
        later = Journal(tmp_path, HEAD, Limits(1, False), past, 2, print)
        assert later.recall(request(1, 6)) is None

    in_cluster(main)


def test_what_could_not_be_scored_is_tried_again_unless_its_step_was_trained(
    tmp_path: Path,
) -> None:
    """A judge that was away may be back."""
    writer = JournalWriter(tmp_path, HEAD)
    places = [writer.append(group_record(step, "0-1", 6, cause="timeout")) for step in (0, 1)]
    writer.append(StepRecord(0, (("0:0-1", places[0]),)))
    writer.close()

    async def main(_: LocalRay) -> None:
        journal = Journal(tmp_path, HEAD, Limits(1, False), read_history(tmp_path), 0, print)
        assert isinstance(journal.recall(request(0, 6)), ScoredRef)
        assert journal.recall(request(1, 6)) is None

    in_cluster(main)
