"""A checkpoint is complete or it does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cohort.learner import checkpoint
from cohort.learner.checkpoint import CheckpointError, Checkpoints, export, latest, load_state


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


def test_a_half_checkpoint_of_an_earlier_start_is_kept_elsewhere(tmp_path: Path) -> None:
    (Checkpoints(tmp_path / "checkpoints", keep=1).begin(7) / "file").write_text("half")
    Checkpoints(tmp_path / "checkpoints", keep=1)
    moved = tmp_path / "replaced-001" / "checkpoints" / "tmp-7" / "file"
    assert moved.read_text() == "half"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    save(checkpoints, 5)
    (checkpoints.folder / "step-5" / "mark").write_text("of another history")
    save(checkpoints, 5)
    kept = tmp_path / "replaced-001" / "checkpoints" / "step-5"
    assert (kept / "mark").read_text() == "of another history"
    assert not (checkpoints.folder / "step-5" / "mark").exists()


def test_a_commit_that_fails_leaves_no_checkpoint_and_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = save(checkpoints, 5)
    real = checkpoint._write

    def full(path: Path, text: str) -> None:
        if path.name == "COMPLETE":
            raise OSError(28, "No space left on device")
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(OSError, match="No space"):
            save(checkpoints, 6)
    assert latest(tmp_path) == old
    checkpoints.discard(6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]
    assert save(checkpoints, 6) == latest(tmp_path)


def test_a_deletion_that_was_cut_short_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        save(checkpoints, 6)
    assert latest(tmp_path) == tmp_path / "step-6"
    save(checkpoints, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]


def test_a_trial_of_saving_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with checkpoints.trial() as folder:
        assert (folder / checkpoint.DRIVER_WAS_HERE).is_file()
        (folder / "hf").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_in_a_unit_that_shows_them() -> None:
    shown = [checkpoint.size_of(n) for n in (17, 3 << 10, 30 << 20, 5 << 29)]
    assert shown == ["17 bytes", "3.0 KiB", "30.0 MiB", "2.5 GiB"]
