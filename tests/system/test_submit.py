"""`submit` against a real Ray cluster with a job server, running the real training program."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import yaml

from cohort.cluster.observe.metrics_file import STEP_KEYS
from tests.models import tiny_llama
from tests.serving import free_ports
from tests.shown import Shown, commands
from tests.system.conftest import REWARDS, is_engine, shared_files
from tests.system.runs import rollouts, rows

pytestmark = [pytest.mark.system, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "deploy" / "configs" / "addition.yaml"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of this module's own."""

    address: str
    environment: dict[str, str]
    pid: int

    def working(self) -> list[str]:
        """Actors and engines that live below the cluster, by what they call themselves."""
        names = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                names.append(" ".join(process.cmdline()))
        kinds = ("ray::RolloutActor", "ray::LearnerWorker", "ray::RewardWorker")
        return [name for name in names if name.startswith(kinds) or is_engine(name)]

    def submit(self, *overrides: str) -> tuple[int, str]:
        """Run `cohort submit` from the repository; its exit code and what it printed."""
        command = [sys.executable, "-m", "cohort.cluster.cli", "submit", str(CONFIG)]
        done = subprocess.run(
            [*command, "--address", self.address, *overrides],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node with a job server that asks for a token, and whose `python` is ours."""
    port, dashboard, agent = free_ports(3)
    # A short path: Ray keeps unix sockets in it.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        token = Path(temp) / "token"
        token.write_text(secrets.token_hex(32))
        environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        log = Path(temp) / "start.log"
        with log.open("w") as output:
            # --block keeps the cluster below one process of ours; `ray stop` would stop every
            # cluster of this machine.
            process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "ray"),
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus=4",
                    f"--port={port}",
                    f"--dashboard-port={dashboard}",
                    f"--dashboard-agent-listen-port={agent}",
                    "--include-dashboard=true",
                    "--disable-usage-stats",
                    f"--temp-dir={temp}",
                ],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + 90
            while not answers(f"{address}/api/version"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"no job server: {log.read_text()}"
                time.sleep(0.5)
            yield Cluster(address, environment, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it asks for the token
    except OSError:
        return False


@pytest.mark.exhaustive
def test_a_run_with_two_of_everything(cluster: Cluster, tmp_path: Path) -> None:
    """Two actors, ranks and reward workers on a cluster, overlapped by a step; its directory."""
    files = shared_files()
    run = tmp_path / "run"
    (tmp_path / "judge.py").write_text(REWARDS)
    code, log = cluster.submit(
        "run.steps=4",
        f"run.dir={run}",
        f"model.path={tiny_llama(tmp_path / 'model')}",
        "model.dtype=float32",
        "task.prompts_per_step=4",
        "task.group_size=4",
        "actors.count=2",
        "actors.max_staleness=1",
        "actors.max_tokens=12",
        "actors.kv_cache_gib=0.25",
        "learner.workers=2",
        "learner.zero_stage=2",
        "rewards.workers=2",
        f"rewards.functions=[{tmp_path}/judge.py:digits]",
        "tracking.table_every=1",
    )
    assert code == 0, log
    assert "step 4/4" in log
    assert "SUCCEEDED" in log
    table = rows(run)
    assert [row["step"] for row in table] == [0, 1, 2, 3]
    for row in table:
        assert set(STEP_KEYS) <= set(row)
        assert row["samples/admitted"] == 16 * (row["step"] + 1)
        assert row["samples/admitted"] == (
            row["samples/trained"] + row["samples/filtered"] + row["samples/failed"]
        )
        parts = ("generate", "reward", "train", "sync", "wait")
        assert math.isclose(row["time/step"], sum(row[f"time/{p}"] for p in parts), rel_tol=0.02)
    # The first step's completions are fresh; later ones were started before the last update.
    assert table[0]["async/staleness_max"] == 0
    assert 0 < max(row["async/staleness_max"] for row in table) <= 1
    assert table[0]["mismatch/logprob_abs_max"] < 1e-3
    assert all(row["mismatch/probe_gap"] < 2e-3 for row in table)
    samples = [sample for step in range(4) for sample in rollouts(run, step)]
    assert len({sample["completion_id"] for sample in samples}) == 64
    assert all(len(sample["token_ids"]) == sample["tokens"] for sample in samples)
    assert len({sample["seed"] for sample in samples}) == 64
    logs = {log.name for log in (run / "logs").iterdir()}
    assert logs >= {"rollout-0.log", "rollout-1.log", "learner-0.log", "learner-1.log"}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["actors"]["count"] == 2
    # What W&B holds is what metrics.jsonl holds.
    [offline] = (run / "wandb").glob("offline-run-*")
    leet = Path(sys.executable).parent / "wandb"
    read = subprocess.run(
        [leet, "leet", "inspect", "--summary", "--json", offline],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    summary = json.loads(read.stdout)["summary"]
    assert summary["reward/mean"] == pytest.approx(table[-1]["reward/mean"])
    assert summary["step"] == 3
    # Nothing of the job lives on in the cluster, which does.
    deadline = time.monotonic() + 20
    while (alive := cluster.working()) or shared_files() - files:
        assert time.monotonic() < deadline, f"left: {alive} {shared_files() - files}"
        time.sleep(0.2)


def test_a_failing_job_says_why(cluster: Cluster, tmp_path: Path) -> None:
    code, log = cluster.submit(f"run.dir={tmp_path}/run", "model.path=/nonexistent")
    assert code == 1, log
    assert "model.path=/nonexistent: there is no such folder" in log
    assert "FAILED" in log


def test_without_the_token_nothing_runs(cluster: Cluster, tmp_path: Path) -> None:
    environment = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    stranger = replace(cluster, environment=environment)
    code, log = stranger.submit(f"run.dir={tmp_path}/run", "model.path=/nonexistent")
    assert code != 0
    assert "RAY_AUTH" in log
    assert "submitted" not in log


@pytest.mark.parametrize("command", [c for c in commands() if c.where == "cluster"], ids=str)
def test_a_command_does_what_the_document_says(
    cluster: Cluster, tmp_path: Path, command: Shown
) -> None:
    """As it is shown, to this cluster: a config that is checked, sent, and refused there at once.

    A whole job is the first test's; here the words of the document must be understood.
    """
    (address,) = re.findall(r"http://[\w.]+:8265", command.text)
    line = command.text.replace(address, cluster.address)
    done = subprocess.run(
        f"{line} model.path=/nonexistent run.dir={tmp_path}/run",
        shell=True,
        cwd=REPOSITORY,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout
    assert "model.path=/nonexistent: there is no such folder" in done.stdout
    assert "FAILED" in done.stdout
