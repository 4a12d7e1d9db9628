"""What a process writes before those who wait for it give up."""

from __future__ import annotations

import subprocess
import sys

LATE = """
import time
from actors.process import stacks_if_late

def hang(seconds):
    time.sleep(seconds)

with stacks_if_late({timeout_s}):
    hang({seconds})
time.sleep(0.5)
print("went on")
"""


def run(timeout_s: float, seconds: float) -> tuple[str, str]:
    code = LATE.format(timeout_s=timeout_s, seconds=seconds)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_a_late_block_shows_where_it_is() -> None:
    printed, errors = run(timeout_s=0.2, seconds=0.5)
    assert printed == "went on\n"
    assert errors.count("most recent call first") == 1
    assert "in hang" in errors


def test_one_in_time_leaves_nothing() -> None:
    assert run(timeout_s=0.4, seconds=0.01) == ("went on\n", "")
