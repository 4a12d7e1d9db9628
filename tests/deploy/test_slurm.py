"""The Slurm script, run by bash with stand-ins for Slurm's, Ray's and our own commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cohort.cluster.config import ClusterConfig

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "train.sbatch"
# Writes down its arguments, waits for a signal where it is to, and ends with the code given.
COHORT = """#!/bin/bash
echo "$RAY_ADDRESS|$*" > trained
trap 'sleep 0.3; echo saved >> trained; exit "$CODE"' TERM
[ -n "$WAITS" ] && { touch waiting; for _ in $(seq 600); do sleep 0.1; done; }
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'n1\\nn2\\n' || echo "$*" > requeued
"""
RAY = """#!/bin/bash
for _ in $(seq "$SLURM_NNODES"); do echo '"node_id"'; done
"""


def job(
    folder: Path, code: int, *arguments: str, waits: str = "", nodes: int = 1
) -> subprocess.Popen[str]:
    programs = {"cohort": COHORT, "scontrol": SCONTROL, "ray": RAY, "srun": "#!/bin/bash\n"}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "n[1-2]"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "CODE": str(code), "WAITS": waits, **slurm},
        text=True,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_run_that_can_go_on_is_put_into_the_queue_again(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    process = job(tmp_path, code, "a.yaml", "run.steps=3")
    assert process.wait(30) == code
    assert (
        tmp_path / "trained"
    ).read_text() == "|train a.yaml run.steps=3 run.resume=true --supervise\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_a_signal_reaches_the_run_which_saves_before_the_job_ends(tmp_path: Path) -> None:
    process = job(tmp_path, 75, "a.yaml", waits="yes")
    while not (tmp_path / "waiting").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert (tmp_path / "trained").read_text().endswith("saved\n")
    assert (tmp_path / "requeued").exists()


def test_several_nodes_join_the_ray_of_the_first(tmp_path: Path) -> None:
    assert job(tmp_path, 0, "a.yaml", nodes=2).wait(30) == 0
    assert (tmp_path / "trained").read_text().startswith("n1:32345|train a.yaml")


def test_the_signal_comes_early_enough_to_save() -> None:
    seconds = re.search(r"#SBATCH --signal=B:TERM@(\d+)", SCRIPT.read_text())
    assert seconds is not None
    assert int(seconds[1]) > ClusterConfig().stop_grace_s + 30


def test_without_a_config_it_says_what_it_needs(tmp_path: Path) -> None:
    process = job(tmp_path, 0)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "CONFIG" in said
