"""Checkpoints are written while training goes on, and hold what they would have held."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.learner.checkpoint import Checkpoints, is_complete
from cohort.learner.ranks import LearnerError
from tests.harness.test_evaluation import scores
from tests.harness.test_rescue import fails
from tests.harness.world import World
from tests.pace import some

MakeWorld = Callable[..., World]
# A write takes a minute: several steps.
SLOW = {"home-0": 60.0}
KEYS = {"run__steps": 6, "run__checkpoint_every": 2, "run__keep_checkpoints": 9}


def held(run: World, step: int) -> dict[str, Any]:
    """All that a checkpoint holds: arrays, files and the driver's state."""
    folder = run.folder / "checkpoints" / f"step-{step}"
    assert is_complete(folder)
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif name == "state.json":
            found[name] = json.loads(path.read_text())
            del found[name]["fingerprint"], found[name]["tracking"]
        elif path.is_file() and name != "manifest.json":
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("slow", [1.0, 60.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_written_behind_holds_what_one_in_the_foreground_holds(
    world: MakeWorld, ranks: int, slow: float
) -> None:
    keys = dict(KEYS, learner__workers=ranks, actors__max_staleness=1)
    run, plain = world("behind", **keys), world("plain", **keys, learner__keep_copy=False)
    run.slow["home-0"] = slow
    assert run.train() == 0
    assert plain.train() == 0
    assert len(run.events("write")) == 2 * ranks
    assert not plain.events("write")
    for step in (2, 4, 6):
        assert held(run, step) == held(plain, step), step


def test_steps_take_no_longer_while_a_checkpoint_is_written(world: MakeWorld) -> None:
    run, without = world("run", **KEYS), world("without", **KEYS)
    run.slow["home-0"] = 3.0
    assert without.train(run__checkpoint_every=0) == 0
    assert run.train() == 0
    kinds = [event.kind for event in run.events("write", "step", "written")]
    assert kinds[:5] == ["step", "step", "write", "step", "written"]
    # Twice what the ranks prepare.
    assert run.time - without.time < 0.5


def test_a_resumed_run_goes_on_from_it_as_if_nothing_had_been(world: MakeWorld) -> None:
    straight, run = world("straight", **KEYS), world("run", **KEYS)
    assert straight.train() == 0
    run.on("write", lambda _: os.kill(os.getpid(), signal.SIGKILL), nth=2)
    assert run.train_in_child() == -signal.SIGKILL
    # The one before is whole, and what was begun is in nobody's way.
    assert run.checkpoint().name == "step-2"
    assert (run.folder / "checkpoints" / "tmp-4").is_dir()
    run.forget_hooks()
    assert run.train_in_child(run__resume=True) == 0
    assert not list((run.folder / "checkpoints").glob("tmp-*"))
    for step in (2, 4, 6):
        ours, theirs = held(run, step), held(straight, step)
        for key in ("counters", "ahead"):
            # They tell what this start has drawn from what came before it.
            del ours["state.json"][key], theirs["state.json"][key]
        assert ours == theirs, step


def test_one_is_written_at_a_time(world: MakeWorld, capsys: pytest.CaptureFixture[str]) -> None:
    run = world(**KEYS)
    run.slow |= SLOW
    assert run.train(run__checkpoint_every=1) == 0
    kinds = [event.kind for event in run.events("write", "written")]
    assert kinds == ["write", "written"] * 5
    assert "waiting for checkpoint 1 to be written" in capsys.readouterr().out


def test_a_copy_that_is_being_read_is_not_written_over(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(**KEYS)
    run.slow |= SLOW
    assert run.train(run__checkpoint_every=3) == 0
    kinds = [event.kind for event in run.events("write", "keep", "written")]
    assert kinds == [*["keep"] * 3, "write", "keep", "written", "keep", "keep"]
    assert "waits for the checkpoint's files" in capsys.readouterr().out


def break_write(_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", some(["full", "dead", "commit"], 3))
def test_a_write_that_fails_is_said_and_tried_again_in_the_foreground(
    world: MakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    run = world(run__steps=40, run__checkpoint_every=10)
    if how == "full":
        run.on("write", break_write, nth=1)
    elif how == "dead":
        run.on("write", lambda _: run.ray.kill("home-0"), nth=1)
    else:
        fails(monkeypatch, Checkpoints, "commit", lambda call: call == 1)
    assert run.train() == 0
    said = capsys.readouterr().out
    assert "checkpoint 10 could not be written, training goes on and tries again later" in said
    if how == "full":
        assert "learner rank 0 failed saving a checkpoint: OSError: " in said
    tried = [(e.kind, Path(e.what).name) for e in run.events("save", "write") if e.what]
    assert tried == [
        ("write", "tmp-10"),
        ("save", "tmp-20"),
        ("write", "tmp-30"),
        ("save", "tmp-40"),
    ]
    assert run.rows()[-1]["learner/restarts"] == 0
    assert not list((run.folder / "checkpoints").glob("tmp-*"))


def test_a_stop_waits_for_what_is_being_written(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(**KEYS)
    run.slow |= SLOW
    run.on("write", lambda _: run.stop())
    assert run.train() == 0
    assert run.state()["step"] == 2
    # Once: its step is the last.
    assert len(run.events("save")) == 1
    assert "waiting for checkpoint 2 to be written" in capsys.readouterr().out


def test_what_is_being_written_outlives_the_ranks(world: MakeWorld) -> None:
    run = world(**KEYS)
    run.slow |= SLOW
    run.on("step", lambda event: run.ray.kill("learner-0") if event.detail["number"] == 2 else None)
    with pytest.raises(LearnerError, match="learner rank 0"):
        run.train()
    assert run.state()["step"] == 2
    assert [event.kind for event in run.events("write", "written")] == ["write", "written"]


def test_an_evaluation_counts_as_the_best_only_with_its_checkpoint(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, {"1": 0.9, "2": 0.5, "3": 0.8, "4": 0.1})
    run = world(run__steps=4, run__evaluate_every=1, run__keep_checkpoints=1)
    run.on("write", break_write, nth=1)
    assert run.train() == 0
    assert run.state()["best"] == {"step": 3, "score": 0.8}
    assert (run.folder / "checkpoints" / "best").resolve().name == "step-3"
