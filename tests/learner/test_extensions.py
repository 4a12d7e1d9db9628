"""Which programs DeepSpeed's compiled part is built with; how it is built is a system test."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from cohort.learner import extensions


@pytest.mark.parametrize("path", ["/usr/bin:/bin", "/usr/bin:{own}:/bin", "{own}:/usr/bin:/bin"])
def test_a_load_uses_the_ninja_of_its_own_installation(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of ninja would build the compiled part again for each other, at every start."""
    own = str(Path(sys.executable).parent)
    found: list[str | None] = []
    monkeypatch.setenv("PATH", path.format(own=own))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # Not by its attribute: `deepspeed.comm` calls torch itself so.
    comm = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(comm, "build_shm_op", lambda: found.append(shutil.which("ninja")))
    extensions.load("cpu")
    assert found == [f"{own}/ninja"]
    assert os.environ["PATH"] == f"{own}:/usr/bin:/bin"
