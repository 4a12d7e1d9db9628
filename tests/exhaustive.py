"""`make exhaustive`: the tests marked so, unless they have passed on this very code.

They take minutes, so each of their groups is run when something has changed that it can see a
difference in: what it passed on is written down, as a hash over these files, in
`tests/exhaustive.passed`. Commit that file with the change; where it does not fit, continuous
integration runs the group.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "exhaustive.passed"
CODE = (".py", ".md", ".yaml", ".lock")
# What a document shows, which tests run.
BLOCK = re.compile(rb"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)

# No test of a group sees the docstrings there; those of tools, which a model reads, are elsewhere.
UNDOCUMENTED = ("actors", "cluster", "learner")


@dataclass(frozen=True)
class Group:
    """Tests that are run together.

    Attributes:
        tests: Their files and folders.
        code: What else they can see a difference in.
        workers: How many run at a time, each on cores of its own.
    """

    tests: tuple[str, ...]
    code: tuple[str, ...]
    workers: int = 2

    def files(self, root: Path) -> Iterator[Path]:
        """Every file that counts, in a fixed order."""
        for name in (*self.tests, *self.code):
            path = root / name
            found = [path]
            if path.is_dir():
                found = sorted(f for f in path.rglob("*") if f.suffix in CODE)
            assert found and found[0].is_file(), f"{name} is not there any more: change GROUPS"
            yield from found

    def content_hash(self, root: Path) -> str:
        """Of the files' names and contents; words do not count: comments and docstrings of the
        code, and what is outside the blocks of a document."""
        digest = hashlib.sha256()
        for path in self.files(root):
            data = path.read_bytes()
            if path.suffix == ".py" and path.relative_to(root).parts[0] in UNDOCUMENTED:
                data = program(data)
            elif path.suffix == ".md":
                data = b"".join(BLOCK.findall(data))
            digest.update(f"{path.relative_to(root)} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()


PRODUCT = ("actors", "cluster", "cohort", "learner", "rewards", "requirements/cpu.lock")
SYSTEM = ("tests/shown.py", "tests/system/conftest.py", "tests/system/runs.py")
GROUPS = {
    "learner": Group(
        tests=(
            "tests/system/test_engine.py",
            "tests/system/test_engine_proof.py",
            "tests/system/test_learner.py",
            "tests/system/test_learner_deaths.py",
            "tests/system/test_lora.py",
            "tests/system/test_reshape.py",
            "tests/system/test_saving_behind.py",
        ),
        code=(
            *("actors", "learner", "requirements/cpu.lock"),
            *("tests/learner", "tests/models.py", "tests/system/conftest.py"),
        ),
    ),
    "runs": Group(
        tests=(
            "tests/harness",
            "tests/rewards/travel",
            "tests/system/test_environments.py",
            "tests/system/test_examples.py",
            "tests/system/test_lora_run.py",
            "tests/system/test_pool_recovery.py",
            "tests/system/test_readme.py",
            "tests/system/test_replay.py",
            "tests/system/test_reward_actor.py",
            "tests/system/test_served_models.py",
            "tests/system/test_train.py",
            "tests/system/test_warmup.py",
        ),
        code=(
            *("README.md", "CONTRIBUTING.md", "docs", "deploy", "examples", *PRODUCT, *SYSTEM),
            *("tests/rewards/mcp_server.py", "tests/rewards/openenv_echo.py", "tests/serving.py"),
        ),
    ),
    # Several raylets, or two of everything, do not answer in time on one busy core.
    "nodes": Group(
        tests=("tests/system/test_nodes.py", "tests/system/test_submit.py"),
        code=(*PRODUCT, *SYSTEM, "tests/serving.py"),
        workers=1,
    ),
}


def program(source: bytes) -> bytes:
    """The code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree).encode()


def passed() -> dict[str, str]:
    """The hash that each group has passed on, by its name."""
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.is_file() else []
    return {name: digest for name, _, digest in (line.partition(" ") for line in lines)}


def run(name: str, group: Group, arguments: Sequence[str], root: Path = ROOT) -> int:
    """Run a group's tests unless they have passed; returns pytest's code."""
    now = group.content_hash(root)
    if passed().get(name) == now:
        print(f"exhaustive: {name}: passed on this code already (tests/exhaustive.passed)")
        return 0
    command = [sys.executable, "-m", "pytest", "-m", "exhaustive"]
    divided = ["-n", str(group.workers)] if group.workers > 1 else []
    done = subprocess.run([*command, *divided, *group.tests, *arguments], cwd=root)
    if done.returncode == 0 and not arguments and group.content_hash(root) == now:
        record = passed() | {name: now}
        RECORD.write_text("".join(f"{key} {record[key]}\n" for key in sorted(record)))
        print(f"exhaustive: {name}: passed; commit tests/exhaustive.passed")
    return done.returncode


def main(arguments: Sequence[str]) -> int:
    return max([run(name, group, arguments) for name, group in GROUPS.items()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
