"""A checkpoint is complete or it does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.checkpoint import CheckpointError, Checkpoints, export, latest, load_state


def save(checkpoints: Checkpoints, step: int) -> Path:
    folder = checkpoints.begin(step)
    (folder / "hf").mkdir()
    (folder / "hf" / "model.safetensors").write_bytes(b"x" * step)
    (folder / "deepspeed" / "state").mkdir(parents=True)
    (folder / "deepspeed" / "state" / "rank0.pt").write_bytes(b"o")
    return checkpoints.commit(step, {"step": step, "cursor": [1, 2]})


def test_latest_and_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    # Numbers, not names, decide what is newest.
    for step in (9, 10):
        save(checkpoints, step)
    found = latest(tmp_path / "c")
    assert found is not None
    assert found.name == "step-10"
    assert load_state(found) == {"step": 10, "cursor": [1, 2]}


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, expected_bytes=1 << 60)
    with pytest.raises(CheckpointError, match=r"takes about 1073741824\.0 GiB, and .* are free"):
        checkpoints.begin(3)
    assert list(tmp_path.iterdir()) == []
    roomy = Checkpoints(tmp_path, keep=2, expected_bytes=10)
    roomy.require_space()
    save(roomy, 3)


def test_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-15", "step-20"]


def damage_marker(path: Path) -> None:
    (path / "COMPLETE").unlink()


def damage_file(path: Path) -> None:
    (path / "hf" / "model.safetensors").write_bytes(b"x")


def damage_missing(path: Path) -> None:
    (path / "deepspeed" / "state" / "rank0.pt").unlink()


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"state.json": ')


@pytest.mark.parametrize("damage", [damage_marker, damage_file, damage_missing, damage_manifest])
def test_torn_checkpoints_are_passed_over(damage: object, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    good = save(checkpoints, 5)
    damage(save(checkpoints, 10))  # type: ignore[operator]
    assert latest(tmp_path) == good
    # The same step is written again over the torn one, and the good one is still kept.
    again = save(checkpoints, 10)
    assert latest(tmp_path) == again
    assert good.exists()


def test_pruning_waits_for_a_complete_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = save(checkpoints, 5)
    folder = checkpoints.begin(10)
    (folder / "hf").mkdir()
    checkpoints.prune()
    assert latest(tmp_path) == good


def test_unfinished_work_is_removed_at_start(tmp_path: Path) -> None:
    (Checkpoints(tmp_path, keep=1).begin(7) / "file").write_text("half")
    assert (tmp_path / "tmp-7").exists()
    Checkpoints(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="nothing was written"):
        checkpoints.commit(3, {})
    checkpoints.begin(3)
    with pytest.raises(CheckpointError, match="nothing was written"):
        checkpoints.commit(3, {})


def test_manifest_names_every_file(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 4)
    sizes = json.loads((path / "manifest.json").read_text())
    assert sizes["hf/model.safetensors"] == 4
    assert set(sizes) == {"hf/model.safetensors", "deepspeed/state/rank0.pt", "state.json"}


def test_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(run, tmp_path / "out")
    save(Checkpoints(run / "checkpoints", keep=1), 6)
    (tmp_path / "out").mkdir()
    assert export(run, tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"x" * 6
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
