"""The command line as a user runs it, on tiny models."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cohort.actors.process import mapped_shared_memory
from tests.models import tiny_llama

COHORT = str(Path(sys.executable).parent / "cohort")
CONFIG = str(Path(__file__).resolve().parents[2] / "deploy" / "configs" / "addition.yaml")

# Rewards that a random model can earn: how many of its tokens are digits.
REWARDS = '''
import os, time

def digits(prompts, completions, completion_ids, answer, **columns):
    """Share of digits among the characters of each completion."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [sum(ch.isdigit() for ch in text) / max(len(text), 1) for text in texts]

def raises(completions, **_):
    raise RuntimeError("the judge is out to lunch")

def short(completions, **_):
    return [1.0]

def hangs(completions, **_):
    time.sleep(3600)
'''


class Cohort:
    """Runs `cohort` in a folder of its own and knows what it started."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []
        (folder / "judge.py").write_text(REWARDS)
        # A user's own modules, with the names of our folders: nothing of ours may import them.
        (folder / "rewards.py").write_text("from judge import digits\n")
        (folder / "theirs.py").write_text("from rewards import digits\n")
        (folder / "cluster").mkdir()
        for name in ("actors.py", "learner.py", "cluster/__init__.py"):
            (folder / name).write_text("raise RuntimeError('imported in place of ours')\n")

    def arguments(self, command: str, **overrides: object) -> list[str]:
        """The quickstart's config made small; keyword a__b is config key a.b."""
        keys = {
            "model.path": self.model,
            "model.dtype": "float32",
            "run.steps": 2,
            "task.prompts_per_step": 4,
            "task.group_size": 4,
            "actors.max_tokens": 12,
            "actors.kv_cache_gib": 0.25,
            "learner.learning_rate": 1e-3,
            "rewards.functions": "[judge.py:digits]",
        } | {name.replace("__", "."): value for name, value in overrides.items()}
        return [COHORT, command, CONFIG, *(f"{key}={value}" for key, value in keys.items())]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", "COHORT_TEST": self.mark}

    def run(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run to the end; output is captured."""
        return subprocess.run(
            arguments,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """The live processes of our runs, and what they call themselves."""
        return ours(self.mark)

    def process(self, title: str) -> psutil.Process:
        """The live process of our runs whose title begins so; vLLM and Ray set titles."""
        [found] = [process for process, name in ours(self.mark) if name.startswith(title)]
        return found

    def engine(self) -> psutil.Process:
        """The live engine of our runs."""
        [found] = [process for process, name in ours(self.mark) if is_engine(name)]
        return found

    def train(self, **overrides: object) -> subprocess.CompletedProcess[str]:
        return self.run(*self.arguments("train", **overrides))

    def start(self, **overrides: object) -> subprocess.Popen[str]:
        """Start training without waiting for it."""
        process = subprocess.Popen(
            self.arguments("train", **overrides),
            cwd=self.folder,
            env=self.environment(),
            stdout=(self.folder / "out.log").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("cohort"), tiny_model)


def is_engine(title: str) -> bool:
    """Whether this is vLLM's process. Where RAY_CLIENT_MODE, which Ray sets again on import, comes
    first in its environment, the process cannot give itself its name."""
    return "VLLM::EngineCore" in title or "multiprocessing.spawn import spawn_main" in title


def ours(mark: str) -> list[tuple[psutil.Process, str]]:
    """Live processes that descend from a command of ours (they inherited its environment), and
    what they call themselves."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.environ().get("COHORT_TEST") == mark:
                found.append((process, " ".join(process.cmdline())[:120]))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


# The number is that of the process which made it, or of the driver for the learner's files.
OWNED = re.compile(r"(?:__KMP_REGISTERED_LIB_|cohort-rollout-\d+-|cohort-learner-)(\d+)[_-]")


def shared_files() -> set[str]:
    """Shared memory of runs, but not what a living process uses or has under its number."""
    used = set()
    for pid in psutil.pids():
        with contextlib.suppress(PermissionError):
            used |= {path.name for path in mapped_shared_memory([pid])}
    found = set()
    for name in set(os.listdir("/dev/shm")) - used:
        owner = OWNED.match(name)
        if owner and psutil.pid_exists(int(owner[1])):
            continue
        # Python's own semaphores and blocks have no owner in their names: another test that runs
        # beside this one may have left them.
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        if name.startswith(("cohort-", "__KMP_", *(("psm_", "sem.mp-") if alone else ()))):
            found.add(name)
    return found


@pytest.fixture
def nothing_left(cohort: Cohort) -> Iterator[Callable[[], None]]:
    """Call it at the end: no process of the runs may live, no shared memory file be new."""
    files = shared_files()

    def check(within: float = 40) -> None:
        deadline = time.monotonic() + within
        while (alive := [name for _, name in ours(cohort.mark)]) or shared_files() - files:
            assert time.monotonic() < deadline, f"left: {alive} {shared_files() - files}"
            time.sleep(0.2)

    yield check
    # After a failure too: a run that went on would take the cores of every later test.
    while alive := ours(cohort.mark):
        for process, _ in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for started in cohort.started:
            started.poll()
