"""Seeds, records, and what a process leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cohort.actors.engine import stop_token_ids
from cohort.actors.process import last_lines
from cohort.actors.records import Completion, derive_seed


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    seeds = {
        derive_seed(run, "rollout", step, prompt)
        for run in (0, 1)
        for step in range(5)
        for prompt in ("0-a", "0-b", "1-a")
    }
    assert len(seeds) == 30
    # Sample i of a group has seed + i: the ranges of different groups must not touch.
    assert min(abs(a - b) for a in seeds for b in seeds if a != b) > 1000
    code = "from cohort.actors.records import derive_seed; print(derive_seed(3, 'rollout', 1, 'x'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(3, "rollout", 1, "x")


def test_a_completion_with_a_missing_logprob_cannot_exist() -> None:
    with pytest.raises(ValueError, match="3 token ids, 2 log-probs"):
        Completion("c", "p", np.arange(3), np.zeros(2), "stop", 0, (0, 0), "")


def test_every_end_token_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    assert stop_token_ids(str(tmp_path), 5) == [2, 5, 7, 9]
    assert stop_token_ids(str(tmp_path / "none"), None) == []


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n" + "\n".join(f"line {i}" for i in range(40)))
    assert last_lines(log, count=2) == "line 38\nline 39"
    assert last_lines(log, count=99, start=4).startswith("line 0")
    assert last_lines(tmp_path / "none") == "(no log)"


def test_sigkill_of_a_process_takes_its_grandchildren_and_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    folder.mkdir()
    pids = tmp_path / "pids"
    # The grandchild is in a session of its own and ignores every signal that can be ignored.
    grandchild = "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    parent = f"""
import os, subprocess, sys, time
from pathlib import Path
from cohort.actors.process import start_reaper
start_reaper(Path({str(folder)!r}))
child = subprocess.Popen([sys.executable, "-c", {grandchild!r}], start_new_session=True)
Path({str(pids)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    # Ray kills an actor's direct children before the actor: the watcher must not be one.
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline, "the parent never started its child"
        time.sleep(0.05)
    child = int(pids.read_text())
    assert [p.pid for p in psutil.Process(process.pid).children()] == [child]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild outlived its grandparent"
        time.sleep(0.05)
    while folder.exists():
        assert time.monotonic() < deadline, "the folder was left behind"
        time.sleep(0.05)


def test_packages_import_without_the_heavy_ones() -> None:
    code = """
import sys
import cohort.actors.engine, cohort.actors.pool, cohort.actors.rollout
import cohort.rewards.tasks, cohort.rewards.worker, cohort.rewards.pool
import cohort.learner.config, cohort.cluster.config, cohort.cluster.cli, cohort.cluster.placement
heavy = {"vllm", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
