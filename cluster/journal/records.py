"""The records of the journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import JsonValue

from cohort.actors.records import (
    Completion,
    Failure,
    Group,
    GroupMeta,
    NotSynced,
    Prompt,
    RewardError,
    ScoredGroup,
    ScoreMeta,
)
from cohort.actors.turns import EpisodeEnd, EpisodeFailure, EpisodeMeta, Turn, TurnShape
from cohort.cluster.journal.values import Codec


@dataclass(frozen=True)
class Place:
    """Where a record lies: the number of its segment and the byte in it."""

    segment: int
    offset: int


@dataclass(frozen=True)
class Head:
    """The first record of every segment.

    Attributes:
        run: The fingerprint of the run that wrote it.
        threads: That each rank of its learner computes with; sums over another number of them have
            other bits.
    """

    run: dict[str, JsonValue]
    threads: int
    version: int = 1


@dataclass(frozen=True)
class GroupRecord:
    """A group that was generated and scored for a step: all that training it again needs.

    Attributes:
        seed: Of the group; those of its completions are in them.
    """

    step: int
    seed: int
    meta: GroupMeta
    scores: ScoreMeta
    scored: ScoredGroup

    @property
    def is_sound(self) -> bool:
        """Whether every completion was scored, and no episode failed."""
        return not self.scores.errors and not any(e.failure for e in self.meta.episodes)


@dataclass(frozen=True)
class StepRecord:
    """What a step trains, written before it does. The last one of a step counts.

    Attributes:
        groups: Ids and places in the order of the batch.
        failed: Ids of the groups that could not be generated or scored, and why.
    """

    step: int
    groups: tuple[tuple[str, Place], ...]
    failed: tuple[tuple[str, Failure], ...] = ()


@dataclass(frozen=True)
class WeightsRecord:
    """What a step has led to: the fingerprint of the weights that were published after it."""

    step: int
    version: int
    fingerprint: str


Record: TypeAlias = Head | GroupRecord | StepRecord | WeightsRecord

CODEC = Codec(
    Place, Head, GroupRecord, StepRecord, WeightsRecord,
    Prompt, Completion, Group, ScoredGroup, RewardError, GroupMeta, ScoreMeta, Failure, NotSynced,
    Turn, TurnShape, EpisodeEnd, EpisodeMeta, EpisodeFailure,
)  # fmt: skip


@dataclass(frozen=True)
class Label:
    """What can be known of a record without reading all of it.

    Attributes:
        id: Of a group; else empty.
    """

    kind: str
    step: int = -1
    id: str = field(default="")


def label(record: Record) -> Label:
    """The label that goes in front of a record."""
    if isinstance(record, Head):
        return Label("Head")
    if isinstance(record, GroupRecord):
        return Label("GroupRecord", record.step, record.meta.group_id)
    return Label(type(record).__name__, record.step)


def to_bytes(record: Record) -> bytes:
    """The payload of a record's frame: its label, then the record."""
    tag = label(record)
    short = CODEC.pack([tag.kind, tag.step, tag.id])
    return len(short).to_bytes(4, "little") + short + CODEC.pack(record)


def label_of(payload: bytes) -> Label:
    """The label of a payload."""
    value = CODEC.unpack(payload[4 : 4 + int.from_bytes(payload[:4], "little")])
    if not isinstance(value, list):
        raise ValueError("a record without a label")
    return Label(*value)


def from_bytes(payload: bytes) -> Record:
    """The record of a payload."""
    value = CODEC.unpack(payload[4 + int.from_bytes(payload[:4], "little") :])
    if not isinstance(value, (Head, GroupRecord, StepRecord, WeightsRecord)):
        raise ValueError(f"a record of kind {type(value).__name__}")
    return value
