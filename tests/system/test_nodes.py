"""A real cluster of several nodes, each a raylet on this machine: they join, and are lost."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving import free_ports
from tests.system.conftest import COHORT, Cohort
from tests.system.runs import rows

# Two minutes, which the two cores of a busy machine may not have to spare for three raylets.
pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]

RAY = str(Path(sys.executable).parent / "ray")


class Nodes:
    """A Ray cluster whose nodes have one core each."""

    def __init__(self, folder: Path, cohort: Cohort) -> None:
        self._folder = folder
        self._cohort = cohort
        self._started: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{free_ports(1)[0]}"

    def head(self) -> psutil.Process:
        port = self.address.rpartition(":")[2]
        return self._start("--head", f"--port={port}", f"--temp-dir={self._folder}")

    def join(self) -> psutil.Process:
        return self._start(f"--address={self.address}")

    def _start(self, *options: str) -> psutil.Process:
        """Start a node; the process of its raylet."""
        log = (self._folder / f"node-{len(self._started)}.log").open("wb")
        command = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        if "--head" in options:
            command.append("--include-dashboard=false")
        node = subprocess.Popen(
            command, env=self._cohort.environment(), stdout=log, stderr=log, start_new_session=True
        )
        self._started.append(node)

        def raylet() -> psutil.Process | None:
            assert node.poll() is None, Path(log.name).read_text()
            children = psutil.Process(node.pid).children(recursive=True)
            return next((child for child in children if child.name() == "raylet"), None)

        return until(raylet, 60)

    def end(self) -> None:
        for node in reversed(self._started):
            node.terminate()
            node.wait(60)


def until(what: Callable[[], Any], seconds: float) -> Any:
    """Wait until something is true; what it is."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return found


@pytest.fixture
def nodes(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    # A short path: Ray keeps unix sockets in it.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        token = Path(temp) / "token"
        token.write_text(secrets.token_hex(32))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        made = Nodes(Path(temp), cohort)
        yield made
        made.end()


@pytest.mark.usefixtures("all_cores")
def test_nodes_that_join_get_engines_and_those_that_are_lost_are_done_without(
    cohort: Cohort, nodes: Nodes, nothing_left: Callable[[], None]
) -> None:
    nodes.head()
    folder = cohort.folder / "nodes"
    # An engine and a rank fill the head.
    run = cohort.start(
        run__dir=folder, run__steps=1_000_000, cluster__address=nodes.address, actors__count=1
    )

    def serving(count: int) -> Callable[[], bool]:
        def check() -> bool:
            assert run.poll() is None, (cohort.folder / "out.log").read_text()
            there = (folder / "metrics.jsonl").is_file()
            return there and [row["actors/serving"] for row in rows(folder)[-1:]] == [count]

        return check

    until(serving(1), 120)
    second = nodes.join()
    scaled = cohort.run(COHORT, "scale", str(folder), "actors=2")
    # The node is there before Ray says so.
    while scaled.returncode and "a CPU engine needs a core" in scaled.stdout + scaled.stderr:
        scaled = cohort.run(COHORT, "scale", str(folder), "actors=2")
    assert scaled.returncode == 0, scaled.stdout + scaled.stderr
    until(serving(2), 120)
    before = rows(folder)[-1]["step"]
    second.send_signal(signal.SIGKILL)
    until(serving(1), 60)
    after = rows(folder)[-1]["step"]
    until(lambda: rows(folder)[-1]["step"] > after + 3, 60)
    nodes.join()
    until(serving(2), 120)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 128 + signal.SIGTERM, (cohort.folder / "out.log").read_text()
    last = rows(folder)[-1]
    assert before < after < last["step"]
    assert last["samples/failed"] == 0
    assert last["samples/admitted"] == 16 * (last["step"] + 1)
    nodes.end()
    nothing_left()
