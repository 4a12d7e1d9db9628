"""`submit` against a real Ray cluster with a job server, running the real training program."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.models import tiny_llama

pytestmark = [pytest.mark.system, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "deploy" / "configs" / "addition.yaml"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of this module's own."""

    address: str
    environment: dict[str, str]

    def submit(self, *overrides: str) -> tuple[int, str]:
        """Run `cohort submit` from the repository; its exit code and what it printed."""
        command = [sys.executable, "-m", "cluster.cli", "submit", str(CONFIG)]
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
            yield Cluster(address, environment)
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


def overrides_for(run_dir: Path, model: Path) -> list[str]:
    return [
        "run.steps=1",
        f"run.dir={run_dir}",
        f"model.path={model}",
        "actors.count=2",
        "actors.max_tokens=8",
        "task.prompts_per_step=2",
        "task.group_size=2",
    ]


def test_one_step_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    run_dir = tmp_path / "run"
    code, log = cluster.submit(*overrides_for(run_dir, model))
    assert code == 0, log
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1
    assert "step 1/1" in log
    assert "SUCCEEDED" in log


def test_a_failing_job_says_why(cluster: Cluster, tmp_path: Path) -> None:
    code, log = cluster.submit(*overrides_for(tmp_path / "run", Path("/nonexistent")))
    assert code == 1, log
    assert "model.path=/nonexistent: there is no such folder" in log
    assert "FAILED" in log


def test_without_the_token_nothing_runs(cluster: Cluster, tmp_path: Path) -> None:
    stranger = Cluster(cluster.address, {**cluster.environment, "RAY_AUTH_MODE": "disabled"})
    code, log = stranger.submit(*overrides_for(tmp_path / "run", Path("/nonexistent")))
    assert code != 0
    assert "RAY_AUTH" in log
    assert "submitted" not in log
