"""The commands and snippets that the documents show, and where each of them is run.

Every command of a `sh` block goes to one place, and what is sent to a place is run there as it is
written, with more words after it that make it small. A command that no place takes is an error, so
that none can be added to a document without being run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a reader meets them: a command finds what those before it have made.
DOCUMENTS = (
    "README.md",
    "docs/configuration.md",
    "docs/rewards-and-data.md",
    "docs/environments.md",
    "docs/algorithms.md",
    "docs/warm-up.md",
    "docs/run-directory.md",
    "docs/clusters.md",
    "docs/python-api.md",
    "docs/troubleshooting.md",
    "docs/faq.md",
    "docs/guarantees.md",
    "deploy/README.md",
    "examples/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
Where = Literal["fast", "stack", "cluster", "examples", "elsewhere"]

# fast: tests/test_readme.py, in seconds. stack: tests/system/test_readme.py, one after another in
# one scratch copy. cluster: tests/system/test_submit.py, which has a Ray cluster. examples:
# tests/system/test_examples.py.
PLACES: dict[str, Where] = {
    "cohort keys": "fast",
    "cohort report": "fast",
    ".venv/bin/pytest": "fast",
    "make setup": "stack",
    "make train": "stack",
    "make test": "stack",
    "make test-fast": "stack",
    "make exhaustive": "stack",
    "make mutants": "stack",
    "make lint": "stack",
    "make format": "stack",
    "cohort train": "stack",
    "cohort check": "stack",
    "cohort eval": "stack",
    "cohort warmup": "stack",
    "cohort export": "stack",
    "cohort replay": "stack",
    "python -m vllm.entrypoints.launchers.api_server.entry": "stack",
    "python examples/travel/ask_for_a_trip.py": "stack",
    "cohort submit": "cluster",
    "python examples/grpo_loop.py": "examples",
    "python examples/custom_reward.py": "examples",
    "python examples/custom_task.py": "examples",
    "python examples/guess_number.py": "examples",
    "python examples/own_agent.py": "examples",
    # What is left needs machines, or would reach beyond the tests: `ray start` and `ray stop` act
    # on every cluster of the machine. tests/deploy checks the files that these name.
    "ray start": "elsewhere",
    "ray stop": "elsewhere",
    "ray get-auth-token": "elsewhere",
    "export RAY_AUTH_MODE=token": "elsewhere",
    "docker build": "elsewhere",
    "docker push": "elsewhere",
    "kubectl": "elsewhere",
    "sbatch": "elsewhere",
}


@dataclass(frozen=True)
class Shown:
    """A command as it is written, its comment removed."""

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def kind(self) -> str:
        """The entry of PLACES that it falls under. Raises LookupError when there is none."""
        words = self.words
        starts = [key for key in PLACES if words[: len(key.split())] == key.split()]
        if not starts:
            raise LookupError(
                f"{self.document} shows `{self.text}`, and no test runs such commands"
            )
        return max(starts, key=len)

    @property
    def where(self) -> Where:
        return PLACES[self.kind]

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language, indentation of lists removed."""
    found = []
    text = (ROOT / document).read_text(encoding="utf-8")
    for indent, body in re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.M):
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        found.append("\n".join(lines) + "\n")
    return found


def scratch_copy(folder: Path) -> Path:
    """A copy of the tree to run commands in, on this tree's virtual environment."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "runs", "wandb", "*.egg-info")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    # ruff heeds .gitignore in a repository only, and whatever makes a folder one is enough.
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / ".git").mkdir()
    # What mypy and ruff have read before, so that `make lint` reads what differs.
    for name in (".mypy_cache", ".ruff_cache"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    # Older than the environment's stamp: `make setup` has nothing to install from here.
    for name in ("requirements/cpu.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """In which a person types the commands: `cohort` is on the path, the code is the folder's."""
    binaries = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def commands(*documents: str) -> list[Shown]:
    """The commands of the documents' shell blocks, in order; continued lines are one command."""
    found = []
    for document in documents or DOCUMENTS:
        for block in blocks(document, "sh"):
            waiting = ""
            for line in block.replace("\\\n", " ").splitlines():
                waiting += line + "\n"
                try:
                    words = shlex.split(waiting, comments=True)
                except ValueError:
                    continue  # a quote is open: the next line goes on
                if words:
                    text = waiting.split("  #")[0]
                    found.append(Shown(document, re.sub(r" +", " ", text).strip()))
                waiting = ""
            assert not waiting.strip(), f"{document}: a quote is never closed: {waiting}"
    return found
