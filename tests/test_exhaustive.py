"""When the exhaustive tests are run: see tests/exhaustive.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import exhaustive


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the hash is over, and a record of its own."""
    for file in exhaustive.files():
        target = tmp_path / file.relative_to(exhaustive.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    real = exhaustive.content_hash
    monkeypatch.setattr(exhaustive, "content_hash", lambda: real(tmp_path))
    monkeypatch.setattr(exhaustive, "RECORD", tmp_path / "record")
    monkeypatch.setattr("sys.argv", ["exhaustive"])
    return tmp_path


class Pytest:
    """In the place of the tests themselves."""

    def __init__(self, code: int) -> None:
        self.returncode = code
        self.runs = 0

    def __call__(self, command: list[str], **_: Any) -> Pytest:
        assert command[-4:] == ["-m", "exhaustive", "-n", "2"]
        self.runs += 1
        return self


def test_they_run_again_when_the_learner_changes_and_until_they_pass(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, failing = Pytest(0), Pytest(1)
    monkeypatch.setattr("subprocess.run", failing)
    assert exhaustive.main() == 1
    monkeypatch.setattr("subprocess.run", passing)
    assert [exhaustive.main(), exhaustive.main()] == [0, 0]
    assert (failing.runs, passing.runs) == (1, 1)
    for name in ("learner/grpo.py", "tests/system/test_learner.py", "requirements/cpu.lock"):
        with (tree / name).open("a") as file:
            file.write("# changed\n")
        monkeypatch.setattr("subprocess.run", failing)
        assert exhaustive.main() == 1, name
        monkeypatch.setattr("subprocess.run", passing)
        assert exhaustive.main() == 0
    (tree / "learner" / "new.py").write_text("")
    before = passing.runs
    assert exhaustive.main() == 0
    assert passing.runs == before + 1
