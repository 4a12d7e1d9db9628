"""One driver at a time; a folder that was left behind can be used again; others' files are safe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cohort.cluster import run_dir
from cohort.cluster.config import Config
from cohort.cluster.prepare import RunError
from cohort.cluster.run_dir import (
    LOCK,
    claim_run_dir,
    find_run_dir,
    this_process,
    what_was_recorded,
)

ROOT = Path(__file__).resolve().parents[2]


def config(folder: Path, resume: bool = False) -> Config:
    return Config.model_validate(
        {"model": {"path": "m"}, "run": {"dir": str(folder), "resume": resume}}
    )


HOLDER = """
import sys, time
from pathlib import Path
from tests.cluster.test_run_dir import config
from cohort.cluster.run_dir import claim_run_dir
with claim_run_dir(config(Path(sys.argv[1]))):
    print("claimed", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another driver, once it has claimed the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_live_driver_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = holder(folder)
    half = folder / "checkpoints" / "tmp-4"
    half.mkdir(parents=True)
    try:
        for resume in (False, True):
            for use in (find_run_dir, claim_run_dir):
                with pytest.raises(RunError, match=rf"in use by process {other.pid} on .*: -c"):
                    use(config(folder, resume))
        assert half.is_dir()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    for resume in (False, True):
        with claim_run_dir(config(folder, resume)) as claimed:
            assert claimed.path == folder


def test_the_claim_itself_refuses_whatever_was_looked_at_before(tmp_path: Path) -> None:
    with claim_run_dir(config(tmp_path / "run")):
        other = run_dir.RunDir(tmp_path / "run")
        with pytest.raises(RunError, match="is in use by"):
            other.claim()
        other.release()
        # The refused one has not touched the owner's lock.
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(RunError, match="is in use by"):
            run_dir.RunDir(tmp_path / "run").claim()


def test_of_many_drivers_that_start_at_once_exactly_one_does(tmp_path: Path) -> None:
    started: list[run_dir.RunDir] = []
    refused: list[RunError] = []
    gate = threading.Barrier(16)

    def drive() -> None:
        gate.wait()
        try:
            started.append(claim_run_dir(config(tmp_path / "run")))
        except RunError as error:
            refused.append(error)

    threads = [threading.Thread(target=drive) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(started), len(refused)) == (1, 15)
    assert all("is in use by" in str(error) for error in refused)
    started[0].release()
    claim_run_dir(config(tmp_path / "run")).release()


def elsewhere(folder: Path, age_s: float) -> Path:
    """The lock of a driver on another machine that was last heard of so long ago."""
    folder.mkdir(exist_ok=True)
    owner = replace(this_process(), host="elsewhere", boot="another kernel", pid=77)
    lock = folder / LOCK
    lock.write_text(json.dumps(asdict(owner)))
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


def test_another_machines_driver_that_goes_on_beating_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = elsewhere(tmp_path / "run", 1)
    monkeypatch.setattr(run_dir, "SILENCE_S", 30)
    beat = threading.Timer(0.5, os.utime, [lock])
    beat.start()
    with pytest.raises(RunError, match="in use by process 77 on elsewhere"):
        claim_run_dir(config(tmp_path / "run"))
    beat.join()
    assert "elsewhere" in lock.read_text()


@pytest.mark.parametrize("age_s", [3600, 0.5])
def test_another_machines_driver_that_is_silent_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    elsewhere(tmp_path / "run", age_s)
    monkeypatch.setattr(run_dir, "SILENCE_S", 1.0)
    began = time.monotonic()
    with claim_run_dir(config(tmp_path / "run")):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5
    # Released: the next one, wherever, has nothing to wait for.
    assert (tmp_path / "run" / LOCK).read_text() == ""


def test_an_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "HEARTBEAT_S", 0.05)
    with claim_run_dir(config(tmp_path / "run")):
        lock = tmp_path / "run" / LOCK
        os.utime(lock, (1, 1))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("run: {}\n" if name == "config.yaml" else "")
    return folder


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [],
        ["logs/"],
        ["logs/rollout-0.log", "checkpoints/"],
        [LOCK],
        [LOCK, "logs/", "checkpoints/tmp-3/half", "checkpoints/tmp-trial/driver"],
        [LOCK, "config.yaml", "config.yaml.tmp", "rollouts/", "metrics.jsonl", "wandb_id"],
    ],
)
def test_a_start_that_recorded_nothing_is_simply_started_again(
    tmp_path: Path, names: list[str], resume: bool
) -> None:
    folder = made(tmp_path / "run", *names)
    with claim_run_dir(config(folder, resume)):
        pass


@pytest.mark.parametrize(
    "names",
    [
        [LOCK, "checkpoints/step-3/COMPLETE"],
        [LOCK, "checkpoints/step-3/torn"],
        [LOCK, "rollouts/step-000000.jsonl"],
        ["config.yaml"],
    ],
)
def test_what_was_recorded_is_continued_or_left_alone(tmp_path: Path, names: list[str]) -> None:
    folder = made(tmp_path / "run", *names)
    assert what_was_recorded(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(RunError, match=r"already holds a run: add run\.resume=true"):
        claim_run_dir(config(folder))
    assert sorted(folder.rglob("*")) == before
    with claim_run_dir(config(folder, resume=True)):
        pass


def test_metrics_are_a_record(tmp_path: Path) -> None:
    made(tmp_path, LOCK, "metrics.jsonl")
    assert not what_was_recorded(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert what_was_recorded(tmp_path) == "metrics of 2 steps"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["thesis.tex"],
        ["logs/", "thesis.tex"],
        # Other programs have such folders, too.
        ["checkpoints/model.pt", "logs/"],
        ["wandb/", "train.py"],
    ],
)
def test_folders_of_others_are_refused_and_untouched(
    tmp_path: Path, names: list[str], resume: bool
) -> None:
    folder = made(tmp_path / "theirs", *names)
    before = sorted(folder.rglob("*"))
    with pytest.raises(RunError, match="holds other files and no run"):
        claim_run_dir(config(folder, resume))
    assert sorted(folder.rglob("*")) == before


def test_a_config_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: resnet}\ntrainer: {gpus: 1}\n")
    for resume in (False, True):
        with pytest.raises(RunError, match="holds other files and no run"):
            claim_run_dir(config(tmp_path, resume))


def test_a_folder_that_cannot_be_written_is_said() -> None:
    with pytest.raises(RunError, match=r"run\.dir=/proc/cohort/run cannot be written"):
        claim_run_dir(config(Path("/proc/cohort/run")))
