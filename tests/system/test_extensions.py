"""DeepSpeed's compiled part survives the death of the process that builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

LOAD = "from cohort.learner import extensions; extensions.load('cpu'); print('loaded')"


def test_a_lock_that_a_killed_build_left_stops_nobody() -> None:
    found = "from cohort.learner import extensions; print(extensions.use_folder('cpu'))"
    folder = Path(python(found)[-1]) / "deepspeed_shm_comm"
    folder.mkdir(exist_ok=True)
    left = folder / "lock"
    left.touch()
    assert python(LOAD)[-1] == "loaded"
    assert not left.exists()


def test_a_second_use_finds_the_same_folder() -> None:
    use = "extensions.use_folder('cpu')"
    assert python(f"from cohort.learner import extensions; print({use} == {use})")[-1] == "True"


def test_another_installation_of_the_same_versions_has_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    found = (
        "import os, torch; from cohort.learner import extensions; "
        f"os.environ['TORCH_EXTENSIONS_DIR'] = '{tmp_path}'; print(extensions.use_folder('cpu')); "
        f"os.environ['TORCH_EXTENSIONS_DIR'] = '{tmp_path}'; torch.__file__ = '/another/torch.py'; "
        "print(extensions.use_folder('cpu'))"
    )
    one, other = (Path(line) for line in python(found)[-2:])
    assert one != other and one.parent == other.parent == tmp_path


def test_two_at_a_time() -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        assert out.splitlines()[-1] == "loaded"


def python(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    return result.stdout.splitlines()
