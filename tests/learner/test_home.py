"""The owner of a machine's memory: what it writes never takes a core from the ranks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cohort.learner import behind, home
from cohort.learner.home import LearnerHome


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The scheduling policy of each thread that wrote."""
    found: list[int] = []

    def write(*_: Any) -> None:
        found.append(os.sched_getscheduler(0))

    monkeypatch.setattr(behind, "write", write)
    monkeypatch.setattr(home, "start_reaper", lambda _: None)
    return found


def test_checkpoints_are_written_where_cores_are_idle(seen: list[int], tmp_path: Path) -> None:
    owner = LearnerHome(str(tmp_path), writes=False)
    writing = threading.Thread(target=owner.write, args=(0, 1, str(tmp_path / "checkpoint")))
    writing.start()
    writing.join()
    assert seen == [os.SCHED_IDLE]
    # What ends a frozen rank waits for no idle core.
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_sandbox_that_allows_no_policy_has_its_checkpoints_too(
    seen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    LearnerHome(str(tmp_path), writes=False).write(0, 1, str(tmp_path / "checkpoint"))
    assert seen == [os.SCHED_OTHER]


@pytest.mark.parametrize("writes", [False, True])
def test_what_writing_imports_is_there_before_the_first_checkpoint(
    writes: bool, seen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = threading.Event()
    monkeypatch.setattr(home, "_import_the_writing", imported.set)
    LearnerHome(str(tmp_path), writes)
    assert imported.wait(5 if writes else 0.1) is writes
    assert not seen
