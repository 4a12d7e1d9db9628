"""The list of mutants fits the code: each can be applied, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import out_of_date
from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import FAILED, PASSED, ROOT, Mutant, run_tests

MUTANT = Mutant(
    "cluster/loop.py",
    "await run.stream.admit(min(last, config.run.steps - 1), skipped)",
    "pass",
    "x",
    (),
)


def test_the_list_fits_the_code() -> None:
    assert out_of_date(MUTANTS) == []
    assert len(MUTANTS) >= 30
    files = {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert files == {"actors", "cluster", "learner", "rewards"}


def test_a_mutant_that_cannot_be_applied_is_an_error(tmp_path: Path) -> None:
    assert MUTANT.stale() is None
    gone = Mutant("cluster/loop.py", "not in there", "x", "x", ())
    assert "found 0 times" in str(gone.stale())
    twice = Mutant("cluster/loop.py", "await", "x", "x", ())
    assert "instead of once" in str(twice.stale())
    unknown = Mutant(MUTANT.file, MUTANT.old, "x", "x", ("tests/test_mutants.py::test_no",))
    assert "does not exist" in str(unknown.stale())
    assert "not there" in str(MUTANT.stale(tmp_path))
    assert len(out_of_date([MUTANT, MUTANT])) == 1


@pytest.mark.parametrize(("body", "code"), [("assert True", PASSED), ("assert False", FAILED)])
def test_tests_run_in_a_copy(body: str, code: int) -> None:
    test = "tests/test_mutants.py::test_a_mutant_that_cannot_be_applied_is_an_error"
    line = "    assert MUTANT.stale() is None\n"
    assert (ROOT / "tests/test_mutants.py").read_text().count(line) >= 1
    mutant = Mutant("tests/test_mutants.py", line, f"    {body}\n", "x", (test,))
    ask = run_tests([test], mutant)
    while (verdict := ask()) is None:
        pass
    assert verdict.code == code, verdict.output
