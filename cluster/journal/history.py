"""What a journal says of a run's past: the groups of its steps, and which of them still count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cohort.cluster.journal.records import GroupRecord, Head, Place, StepRecord, WeightsRecord
from cohort.cluster.journal.segments import Segment, cut, head_of, numbers, read_segment


@dataclass(frozen=True)
class History:
    """A journal's contents, without the groups themselves.

    Attributes:
        steps: The record of each step that was about to be trained; the last one counts.
        weights: What each step led to.
        groups: Of each step, the place of each group that was scored for it, by id.
        head: Of the newest segment; None: there is none.
    """

    steps: Mapping[int, StepRecord] = field(default_factory=dict)
    weights: Mapping[int, WeightsRecord] = field(default_factory=dict)
    groups: Mapping[int, Mapping[str, Place]] = field(default_factory=dict)
    head: Head | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> History:
        """What these segments hold, in their order."""
        steps: dict[int, StepRecord] = {}
        weights: dict[int, WeightsRecord] = {}
        groups: dict[int, dict[str, Place]] = {}
        head = None
        for segment in segments:
            head = head_of(segment) or head
            for label, offset in segment.entries:
                record = segment.small.get(offset)
                if isinstance(record, StepRecord):
                    steps[record.step] = record
                elif isinstance(record, WeightsRecord):
                    weights[record.step] = record
                elif label.kind == GroupRecord.__name__:
                    groups.setdefault(label.step, {})[label.id] = Place(segment.number, offset)
        return cls(steps, weights, groups, head)

    @property
    def is_empty(self) -> bool:
        return not (self.steps or self.groups)

    def goes_on_from(self, step: int) -> bool:
        """Whether a run that has done `step` steps is the one that this journal goes on with.

        Its groups were generated with the weights that the steps before them led to. Where the
        record of one of those is missing, that step will be another one, and what was generated
        after it belongs to a past that will not come again.
        """
        last = max(self.steps, default=-1)
        return all(number in self.steps for number in range(step, last + 1))

    def ahead_of(self, step: int) -> dict[int, StepRecord | Mapping[str, Place]]:
        """What a run that has done `step` steps puts back, by step.

        Of a step that was about to be trained its record; of a later one the groups that were
        scored.
        """
        last = max(self.steps, default=-1)
        found: dict[int, StepRecord | Mapping[str, Place]] = {}
        for number in range(step, last + 1):
            found[number] = self.steps[number]
        for number, groups in self.groups.items():
            if number >= max(step, last + 1):
                found[number] = groups
        return found


def read_history(folder: Path) -> History:
    """What the journal of a folder says; touches nothing.

    Raises:
        JournalError: A record is damaged.
    """
    return History.of([read_segment(folder, number) for number in numbers(folder)])


def recover(folder: Path) -> tuple[History, list[str]]:
    """Read a journal whose writer has ended, and cut torn tails off; lines about these for people.

    Raises:
        JournalError: A record is damaged.
        OSError: A tail could not be cut off.
    """
    segments = [read_segment(folder, number) for number in numbers(folder)]
    return History.of(segments), [said for one in segments if (said := cut(folder, one))]
