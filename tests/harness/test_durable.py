"""A checkpoint is on the disk, not in the kernel's memory, before it counts as complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cohort.learner.checkpoint import COMPLETE, Checkpoints, is_complete, latest


class Disk:
    """What was written through, and where the marker was then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced: list[Path] = []
        self.renamed_after = -1
        sync, rename = os.fsync, os.rename

        def fsync(descriptor: int) -> None:
            self.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            sync(descriptor)

        def named(source: Any, target: Any) -> None:
            self.renamed_after = len(self.synced)
            rename(source, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", named)


def test_every_file_and_folder_is_written_through_before_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    folder = checkpoints.begin(3)
    (folder / "hf").mkdir()
    (folder / "deepspeed" / "state").mkdir(parents=True)
    names = ["hf/model.safetensors", "deepspeed/state/rank-0.pt", "learner.json"]
    for name in names:
        (folder / name).write_bytes(b"x" * 100)
    disk = Disk(monkeypatch)
    final = checkpoints.commit(3, {"step": 3})
    before = disk.synced[: disk.renamed_after]
    for name in [*names, "state.json", "manifest.json", "hf", "deepspeed", "deepspeed/state", "."]:
        assert folder / name in before, f"{name} was not written through"
    after = disk.synced[disk.renamed_after :]
    # The new name, then the marker, then the folder that holds the marker.
    places = [after.index(path) for path in (checkpoints.folder, final / COMPLETE, final)]
    assert places == sorted(places)


def test_a_checkpoint_without_its_marker_or_with_a_torn_file_is_passed_over(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    for step in (1, 2, 3):
        (checkpoints.begin(step) / "learner.json").write_text("{}")
        checkpoints.commit(step, {"step": step})
    (checkpoints.folder / "step-3" / COMPLETE).unlink()
    (checkpoints.folder / "step-2" / "learner.json").write_text("")
    assert not is_complete(checkpoints.folder / "step-2")
    assert latest(checkpoints.folder) == checkpoints.folder / "step-1"
