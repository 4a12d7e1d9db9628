"""Applies mutants to copies of the tree and runs tests in them, two at a time."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    *("src", "cohort", "actors", "cluster", "learner", "rewards"),
    *("deploy", "examples", "tests", "docs", "benchmarks"),
)
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile", "LICENSE")
AT_ONCE = 2
LIMIT_S = 180
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """One fault. old: text that occurs exactly once in `file`; new: what is put in its place.

    breaks: the promise that it breaks. tests: pytest's names of the fast tests that notice it.
    """

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def stale(self, root: Path = ROOT) -> str | None:
        """Why it cannot be applied any more; None when it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is not there"
        count = path.read_text().count(self.old)
        if count != 1:
            return f"{self.file}: {self.old!r} is found {count} times instead of once"
        for test in self.tests:
            name = test.split("::")
            file = root / name[0]
            if not file.is_file() or any(
                f"def {part.split('[')[0]}(" not in file.read_text() for part in name[1:]
            ):
                return f"{test} does not exist"
        return None


@dataclass(frozen=True)
class Verdict:
    """How a run of tests ended: pytest's exit code, seconds, its output."""

    code: int
    seconds: float
    output: str


def copy_tree(target: Path) -> None:
    """What the fast tests need of the tree."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in FILES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)


def import_libraries() -> None:
    """What takes seconds to import and is no code of ours; forked processes then have it."""
    import numpy  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import ray.exceptions  # noqa: F401
    import rich.live  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers
    import typer.testing  # noqa: F401
    import xxhash  # noqa: F401

    # transformers imports a name's module when the name is first used.
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM")
    for name in (*names, "GPT2LMHeadModel", "Qwen2ForCausalLM", "LlamaForSequenceClassification"):
        getattr(transformers, name)


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> Callable[[], Verdict | None]:
    """Begin to run tests on a copy of the tree, changed by a mutant; call for the verdict.

    The verdict is None while the tests run.
    """
    folder = Path(tempfile.mkdtemp(prefix="cohort-mutant-"))
    copy_tree(folder)
    if mutant is not None:
        path = folder / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
    log = folder / "output.txt"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _test_in(folder, tests, log)

    def verdict() -> Verdict | None:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if not done:
            if seconds <= LIMIT_S:
                return None
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        # Too long, or ended by a signal: the tests did not pass.
        code = FAILED if code < 0 else code
        text = log.read_text(errors="replace") if log.is_file() else ""
        shutil.rmtree(folder, ignore_errors=True)
        return Verdict(code, seconds, text)

    return verdict


def _test_in(folder: Path, tests: Sequence[str], log: Path) -> None:
    """In a forked process: run the tests in `folder` and end."""
    os.setsid()
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(folder)
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", *COPIED)]:
            del sys.modules[name]
        import pytest

        options = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line", "--timeout=90")
        code = int(pytest.main([*options, "--basetemp", str(folder / "tmp"), *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_all(mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, Verdict]]:
    """The verdict on every mutant, as they come."""
    waiting = list(mutants)
    running: list[tuple[Mutant, Callable[[], Verdict | None]]] = []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            mutant = waiting.pop(0)
            running.append((mutant, run_tests(mutant.tests, mutant)))
        time.sleep(0.05)
        for item in list(running):
            mutant, ask = item
            if (verdict := ask()) is not None:
                running.remove(item)
                yield mutant, verdict
