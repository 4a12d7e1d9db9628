"""When the exhaustive tests are run: see tests/exhaustive.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import exhaustive
from tests.exhaustive import GROUPS, ROOT, Group


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree with a record of its own."""
    for name in ("learner/grpo.py", "learner/deep/step.py", "tests/test_it.py", "cpu.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(exhaustive, "RECORD", tmp_path / "record")
    return tmp_path


class Pytest:
    """In the place of the tests themselves."""

    def __init__(self, code: int) -> None:
        self.returncode = code
        self.runs = 0

    def __call__(self, command: list[str], **_: Any) -> Pytest:
        assert command[3:] == ["-m", "exhaustive", "-n", "2", "tests/test_it.py"]
        self.runs += 1
        return self


def test_they_run_again_when_their_code_changes_and_until_they_pass(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tests=("tests/test_it.py",), code=("learner", "cpu.lock"))
    passing, failing = Pytest(0), Pytest(1)

    def run(name: str = "learner") -> int:
        return exhaustive.run(name, group, (), tree)

    monkeypatch.setattr("subprocess.run", failing)
    assert run() == 1
    monkeypatch.setattr("subprocess.run", passing)
    assert [run(), run()] == [0, 0]
    assert (failing.runs, passing.runs) == (1, 1)
    # Each group has its own line.
    assert [run("other"), run("other"), run()] == [0, 0, 0]
    assert passing.runs == 2
    for name in ("learner/grpo.py", "learner/deep/step.py", "tests/test_it.py", "cpu.lock"):
        with (tree / name).open("a") as file:
            file.write("y = 2\n")
        monkeypatch.setattr("subprocess.run", failing)
        assert run() == 1, name
        monkeypatch.setattr("subprocess.run", passing)
        assert run() == 0
    (tree / "learner" / "new.py").write_text("")
    before = passing.runs
    assert [run(), run()] == [0, 0]
    assert passing.runs == before + 1


def test_words_about_the_code_do_not_count(tree: Path) -> None:
    group = Group(tests=("tests/test_it.py",), code=("learner", "cpu.lock"))
    file = tree / "learner" / "grpo.py"
    file.write_text("def f(x):\n    return x + 1\n")
    before = group.content_hash(tree)
    file.write_text(
        '"""A module."""\n\n\ndef f(x):\n    """One more."""\n    return x + 1  # one\n'
    )
    assert group.content_hash(tree) == before
    file.write_text("def f(x):\n    return x + 2\n")
    assert group.content_hash(tree) != before
    file.write_text('TEXT = """A module."""\n')
    other = group.content_hash(tree)
    file.write_text('TEXT = """Another."""\n')
    assert group.content_hash(tree) != other
    # In tests and elsewhere they do.
    with (tree / "tests" / "test_it.py").open("a") as opened:
        opened.write("# more\n")
    assert group.content_hash(tree) != other


def test_words_of_a_document_do_not_count_and_its_blocks_do(tree: Path) -> None:
    group = Group(tests=("tests/test_it.py",), code=("README.md",))
    file = tree / "README.md"
    text = "# Title\n\nRun\n\n```sh\nmake test\n```\n\n1. or\n   ```sh\n   make lint\n   ```\n"
    file.write_text(text)
    before = group.content_hash(tree)
    file.write_text(text.replace("Title", "Another").replace("Run", "Give"))
    assert group.content_hash(tree) == before
    for old, new in (("make test", "make tests"), ("make lint", "make lints"), ("sh", "python")):
        file.write_text(text.replace(old, new))
        assert group.content_hash(tree) != before, old


def test_every_exhaustive_test_is_in_one_group() -> None:
    """One that is in none would never be run."""
    marked = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.exhaustive\b", path.read_text(encoding="utf-8"))
    ]
    assert len(marked) > 8
    for file in marked:
        if file.name == Path(__file__).name:
            continue
        groups = [
            name
            for name, group in GROUPS.items()
            if any(file.is_relative_to(place) for place in group.tests)
        ]
        assert len(groups) == 1, (file, groups)


def test_what_the_groups_name_is_there() -> None:
    for group in GROUPS.values():
        assert len(group.content_hash(ROOT)) == 64
