"""`make exhaustive`: the tests marked so, unless they have passed on this very code.

They take minutes and depend on the learner and the actors alone, so they are run when those have
changed: what they passed on is written down, as a hash over its files, in
`tests/exhaustive.passed`. Commit that file with a change of the learner; where it does not fit,
continuous integration runs them.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "exhaustive.passed"
# What an exhaustive test can see a difference in.
DEPENDS_ON = (
    "actors",
    "learner",
    "tests/learner",
    "tests/models.py",
    "tests/system/test_engine.py",
    "tests/system/test_engine_proof.py",
    "tests/system/test_learner.py",
    "tests/system/test_learner_deaths.py",
    "tests/system/test_reshape.py",
    "tests/system/test_saving_behind.py",
    "requirements/cpu.lock",
)


def files(root: Path = ROOT) -> Iterator[Path]:
    """Every file that counts, in a fixed order."""
    for name in DEPENDS_ON:
        path = root / name
        found = [path] if path.is_file() else sorted(path.rglob("*.py"))
        assert found, f"{name} is not there any more: change DEPENDS_ON"
        yield from found


def content_hash(root: Path = ROOT) -> str:
    """Of the files' names and contents."""
    digest = hashlib.sha256()
    for path in files(root):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def main() -> int:
    now = content_hash()
    if RECORD.is_file() and RECORD.read_text().strip() == now:
        print("exhaustive: passed on this learner already (tests/exhaustive.passed)")
        return 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "exhaustive", "-n", "2", *sys.argv[1:]], cwd=ROOT
    )
    if done.returncode == 0 and not sys.argv[1:] and content_hash() == now:
        RECORD.write_text(now + "\n")
        print("exhaustive: passed; commit tests/exhaustive.passed")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
