"""The documents' commands, as they are written, on the real stack with tiny models.

In the order of the documents, all in one scratch copy: a command finds what those before it have
made; one that is shown twice is run once. It is left to `make exhaustive`: `.ci/run` has the
README's commands, and other tests run each of the subcommands, only with other keys. Words are
added behind a command to make it small; none are taken away, and the only ones replaced stand for
something that the reader has (JUDGE, REWARD_MODEL).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from cohort.rewards.child import die_with_parent
from tests.models import tiny_llama, tiny_reward_model
from tests.serving import free_ports
from tests.shown import Shown, commands, environment, scratch_copy
from tests.system.test_served_models import START_S, healthy

pytestmark = [pytest.mark.system, pytest.mark.exhaustive]

# A made-up model has no opinion on how long a prompt may be; travel's are long.
CONTEXT = 8192
SMALL = (
    "model.dtype=float32",
    "task.prompts_per_step=2",
    "task.group_size=2",
    "actors.max_tokens=8",
    "actors.kv_cache_gib=0.25",
)
# Exit codes besides 0 that mean: it worked, and an untrained model plans no trip.
NO_TRIP = 1


class Reader:
    """Somebody who types the commands of a document into a shell."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = scratch_copy(folder)
        self.models = models
        self.servers: list[tuple[subprocess.Popen[str], int, Path]] = []

    def type(self, line: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            line,
            shell=True,
            cwd=self.folder,
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout)
        finally:
            # The shell's children too: one that went on would take the cores of later tests.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(line, process.returncode, printed)

    def serve(self, line: str) -> None:
        """Start a server; it is waited for by who asks it."""
        [port] = free_ports()
        log = self.folder / f"server-{port}.log"
        small = f"--port {port} --dtype float32 --enforce-eager --kv-cache-memory-bytes 64M"
        speed = {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with log.open("w") as out:
            server = subprocess.Popen(
                f"exec {line} {small}",
                shell=True,
                cwd=self.folder,
                env={**environment(self.folder), **speed, "OMP_NUM_THREADS": "2"},
                stdout=out,
                stderr=out,
                text=True,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        self.servers.append((server, port, log))

    def wait_for_server(self, index: int = -1) -> int:
        server, port, log = self.servers[index]
        deadline = time.monotonic() + START_S
        while not healthy(f"http://127.0.0.1:{port}"):
            assert server.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no server: {log.read_text()[-3000:]}"
            time.sleep(0.2)
        return port

    def close(self) -> None:
        for server, _, _ in self.servers:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    models = tmp_path_factory.mktemp("models")
    tiny_reward_model(models / "reward")
    config = tiny_llama(models / "tiny") / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "max_position_embeddings": CONTEXT}))
    reader = Reader(tmp_path_factory.mktemp("scratch") / "cohort", models)
    yield reader
    reader.close()


def keys_for(command: Shown, reader: Reader) -> list[str]:
    """What makes a command small: the tiny model unless it names one, few of everything."""
    given = {word.split("=")[0] for word in command.words}
    keys = [] if {"model.path", "--model"} & given else [f"model.path={reader.models / 'tiny'}"]
    return [*keys, *SMALL]


def run_as_shown(command: Shown, reader: Reader) -> None:
    """Run one command; fails unless it does what it says."""
    line, kind = command.text, command.kind
    more: list[str] = []
    expected: tuple[int, ...] = (0,)
    if kind == "cohort train":
        resumed = "run.resume=true" in command.words
        more = [*keys_for(command, reader), f"run.steps={2 if resumed else 1}"]
    elif kind == "cohort check":
        more = [*keys_for(command, reader), "--prompts", "2"]
    elif kind == "cohort warmup":
        # Its other keys are the training's.
        keys = [*keys_for(command, reader)[:2], "actors.max_tokens=512"]
        more = [*keys, "--steps", "2", "--batch-size", "2"]
    elif kind == "cohort eval":
        of_a_run = not any(word.endswith(".yaml") for word in command.words)
        more = [*([] if of_a_run else keys_for(command, reader)), "task.eval_prompts=2"]
    elif kind == "make train":
        keys = [f"model.path={reader.models / 'tiny'}", *SMALL, "run.steps=1"]
        more = [f"ARGS={' '.join(keys)}"]
    elif kind in ("make test", "make test-fast"):
        more = ["ARGS=tests/actors/test_records.py"]
    elif kind == "make exhaustive":
        more = ["ARGS=--collect-only"]
    elif kind == "make mutants":
        more = ["ARGS=max_staleness"]
    elif "api_server" in kind:
        line = re.sub(r"\bJUDGE\b", str(reader.models / "tiny"), line)
        line = re.sub(r"\bREWARD_MODEL\b", str(reader.models / "reward"), line)
        if "--max-model-len" not in line and "--runner" not in line:
            more = ["--max-model-len", str(CONTEXT)]
        reader.serve(" ".join([line, *map(shlex.quote, more)]))
        return
    elif "ask_for_a_trip" in kind:
        port = reader.wait_for_server()
        more = ["--url", f"http://127.0.0.1:{port}/v1", "--max-tokens", "16"]
        expected = (0, NO_TRIP)
    done = reader.type(" ".join([line, *map(shlex.quote, more)]))
    assert done.returncode in expected, f"{line} {more} -> {done.returncode}\n{done.stdout[-4000:]}"


STACK = list({command.text: command for command in commands() if command.where == "stack"}.values())


@pytest.mark.parametrize("command", STACK, ids=str)
def test_a_command_does_what_the_document_says(command: Shown, reader: Reader) -> None:
    run_as_shown(command, reader)


def test_every_server_has_started_and_every_folder_is_there(reader: Reader) -> None:
    for index in range(len(reader.servers)):
        reader.wait_for_server(index)
    assert len(reader.servers) >= 3
    # What the documents say that their commands leave behind.
    assert (reader.folder / "runs/mine/config.yaml").is_file()
    assert (reader.folder / "runs/mine-model/config.json").is_file()
    assert len((reader.folder / "runs/mine/metrics.jsonl").read_text().splitlines()) == 2
