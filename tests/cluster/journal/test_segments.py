"""Records, frames and segments: exact, torn at any byte, damaged in the middle, on a full disk."""

from __future__ import annotations

import errno
import os
import random
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.cluster.journal.format import HEADER, DamagedError, frame, frames
from cohort.cluster.journal.history import read_history, recover
from cohort.cluster.journal.records import CODEC, Head, StepRecord, from_bytes, label_of, to_bytes
from cohort.cluster.journal.retention import removable
from cohort.cluster.journal.segments import (
    JournalError,
    numbers,
    read_group,
    read_segment,
    segment_file,
)
from cohort.cluster.journal.writer import JournalWriter
from tests.cluster.journal.made import a_history, failure, group_record, same

HEAD = Head({"config": {"run": {"seed": 0}}}, threads=2)


class Two(IntEnum):
    TWO = 2


def test_a_group_comes_back_bit_for_bit() -> None:
    record = group_record(
        3, "0-7", 2**48 - 1, cause="raised", answer=4, at=[1.5, None, True], raw=b"\x00"
    )
    record.scored.group.completions[0].logprobs[:4] = [np.nan, -np.inf, -0.0, 1e-45]
    found = from_bytes(to_bytes(record))
    assert same(found, record)
    assert found is not record
    label = label_of(to_bytes(record))
    assert (label.kind, label.step, label.id) == ("GroupRecord", 3, "3:0-7")


def test_what_a_dataset_may_hold_is_kept_as_well_as_it_can_be() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    given: dict[Any, Any] = {
        "big": 2**70, "numpy": np.float32(0.5), "enum": Two.TWO, 3: {"set": {1}}, "at": at,
        "objects": np.array([object], dtype=object), "flag": np.True_, "name": np.str_("n"),
    }  # fmt: skip
    found: Any = CODEC.unpack(CODEC.pack(given))
    assert found["big"] == str(2**70)
    assert (found["numpy"], found["enum"], found["flag"], found["name"]) == (0.5, 2, True, "n")
    assert found[3] == {"set": "{1}"}
    assert found["at"] == repr(at)
    assert "object" in found["objects"]


def test_frames_torn_at_any_byte_end_at_the_last_whole_one() -> None:
    payloads = [os.urandom(n) for n in (0, 1, 40)]
    whole = b"".join(map(frame, payloads))
    ends = [sum(len(frame(p)) for p in payloads[:n]) for n in range(4)]
    for size in range(len(whole) + 1):
        found = list(frames(whole[:size]))
        assert [f.payload for f in found] == payloads[: len(found)]
        assert len(found) == sum(size >= end for end in ends[1:])


def test_damage_is_found_wherever_it_is() -> None:
    """Any changed byte: before a whole record it is damage, in the last one a torn tail."""
    payloads = [b"first", b"second", b"third"]
    whole = b"".join(map(frame, payloads))
    starts = [0, len(frame(b"first")), len(frame(b"first") + frame(b"second"))]
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x41
        if place >= starts[2]:
            assert [f.payload for f in frames(bytes(changed))] == payloads[:2]
        else:
            with pytest.raises(DamagedError) as error:
                list(frames(bytes(changed)))
            assert error.value.offset == max(s for s in starts if s <= place)


def test_a_length_that_points_anywhere_is_no_record() -> None:
    whole = frame(b"payload")
    for length in (0, 1, 6, 8, 2**31, 2**32 - 1):
        changed = HEADER.pack(whole[:4], length, 0) + b"payload"
        assert not list(frames(changed))


def written(folder: Path, seed: int = 0) -> tuple[Path, list[Any], list[int]]:
    """A segment's file, its records behind the head, and where each record ends."""
    writer = JournalWriter(folder, HEAD)
    records: list[Any] = [*a_history(seed), StepRecord(0, (), (failure("0:x"),))]
    ends = [writer.sizes[1]]
    for record in records:
        writer.append(record)
        ends.append(writer.sizes[1])
    writer.close()
    return segment_file(folder, 1), records, ends


def test_a_tail_torn_at_any_byte_is_cut_and_said(tmp_path: Path) -> None:
    file, records, ends = written(tmp_path / "whole")
    whole = file.read_bytes()
    assert ends[-1] == len(whole)
    cuts = sorted(
        {*ends, *(e - 1 for e in ends), *random.Random(0).choices(range(len(whole)), k=300)}
    )
    folder = tmp_path / "torn"
    folder.mkdir()
    for size in cuts:
        segment_file(folder, 1).write_bytes(whole[:size])
        history, said = recover(folder)
        kept = sum(size >= end for end in ends)
        assert segment_file(folder, 1).stat().st_size == (ends[kept - 1] if kept else 0)
        assert bool(said) == (size not in (0, *ends))
        places = {name: p for groups in history.groups.values() for name, p in groups.items()}
        groups = [r for r in records[: max(0, kept - 1)] if not isinstance(r, StepRecord)]
        assert set(places) == {r.meta.group_id for r in groups}
        for record in groups:
            assert same(read_group(folder, places[record.meta.group_id]), record)
        # The next writer goes on beside it.
        assert recover(folder)[1] == []


def test_damage_in_the_middle_names_file_and_byte(tmp_path: Path) -> None:
    file, _, ends = written(tmp_path)
    data = bytearray(file.read_bytes())
    data[ends[2] + 30] ^= 1
    file.write_bytes(data)
    with pytest.raises(JournalError, match=rf"segment-000001.log: the record at byte {ends[2]} is"):
        recover(tmp_path)
    assert file.read_bytes() == data


def test_every_writer_begins_a_segment_of_its_own(tmp_path: Path) -> None:
    for step in range(3):
        writer = JournalWriter(tmp_path, HEAD)
        writer.append(group_record(step, "0-1"))
        writer.close()
    assert numbers(tmp_path) == [1, 2, 3]
    assert [read_segment(tmp_path, n).last_step for n in (1, 2, 3)] == [0, 1, 2]
    assert sorted(read_history(tmp_path).groups) == [0, 1, 2]
    assert JournalWriter(tmp_path, HEAD).last_steps == {1: 0, 2: 1, 3: 2, 4: -1}


def test_a_large_segment_is_followed_by_another(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, HEAD, segment_bytes=3000)
    places = [writer.append(group_record(step, "0-1")) for step in range(9)]
    assert writer.current > 2
    for step, place in enumerate(places):
        assert same(read_group(tmp_path, place), group_record(step, "0-1"))


@pytest.mark.parametrize("room", [0, 7, 500])
def test_a_record_without_room_leaves_nothing_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    writer = JournalWriter(tmp_path, HEAD)
    first = writer.append(group_record(0, "0-0"))
    with monkeypatch.context() as patch:
        real, left = os.pwrite, room

        def pwrite(file: int, data: memoryview, offset: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = real(file, data[:left], offset)
            left -= done
            return done

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space"):
            writer.append(group_record(0, "0-1"))
    assert read_segment(tmp_path, 1).torn == 0
    second = writer.append(group_record(0, "0-2"))
    assert same(read_group(tmp_path, first), group_record(0, "0-0"))
    assert same(read_group(tmp_path, second), group_record(0, "0-2"))


def test_what_a_resume_needs_is_never_removed() -> None:
    """All small journals: the newest checkpoint's steps stay, whatever the limit."""
    dice = random.Random(1)
    for _ in range(2000):
        count = dice.randrange(1, 6)
        sizes = {n: dice.randrange(10) for n in range(1, count + 1)}
        last = {n: dice.randrange(-1, 12) for n in sizes}
        checkpoints = sorted(dice.sample(range(12), dice.randrange(0, 3)))
        limit, keep = dice.randrange(30), dice.random() < 0.2
        gone = removable(sizes, last, checkpoints, limit, keep)
        assert not (keep and gone)
        assert gone == sorted(sizes)[: len(gone)]
        assert all(last[n] < checkpoints[-1] for n in gone)
        left = [n for n in sizes if n not in gone]
        if not keep and checkpoints and left and sum(sizes[n] for n in left) > limit:
            assert last[left[0]] >= checkpoints[-1]
