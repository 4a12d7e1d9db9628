"""What a run goes on from, how often it will save, and what becomes of an older config."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohort.cluster.config import Config
from cohort.cluster.continuing import planned_saves, where_to_go_on, write_config
from cohort.cluster.prepare import RunError
from cohort.learner.aside import Aside
from cohort.learner.checkpoint import Checkpoints


def config(steps: int = 10, every: int = 0, resume: bool = True) -> Config:
    run = {"steps": steps, "checkpoint_every": every, "resume": resume}
    return Config.model_validate({"model": {"path": "m"}, "run": run})


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("every", [0, 1, 3, 5, 20])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_planned_saves_are_those_that_the_loop_makes(steps: int, every: int, first: int) -> None:
    saves = 0
    for step in range(first, steps):
        done = step + 1
        saves += done == steps or bool(every and done % every == 0)
    if first < steps:
        assert planned_saves(config(steps, every), first) == saves


def test_a_run_goes_on_from_its_newest_complete_checkpoint_if_it_is_told_to(
    tmp_path: Path,
) -> None:
    assert where_to_go_on(config(), tmp_path) is None
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (2, 4):
        (checkpoints.begin(step) / "part").write_text("x")
        checkpoints.commit(step, {"step": step})
    (tmp_path / "checkpoints" / "step-9").mkdir()
    found = where_to_go_on(config(), tmp_path)
    assert found is not None
    assert (found.step, found.checkpoint.name) == (4, "step-4")
    assert where_to_go_on(config(resume=False), tmp_path) is None


def test_damaged_metrics_are_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"line 2 is not JSON.*move that file away"):
        where_to_go_on(config(), tmp_path)


def test_an_older_config_that_says_something_else_is_kept(tmp_path: Path) -> None:
    file, aside = tmp_path / "config.yaml", Aside(tmp_path)
    write_config(file, "run:\n  steps: 3\n  resume: false\n", aside)
    write_config(file, "run:\n  steps: 3\n  resume: true\n", aside)
    assert aside.folder is None
    write_config(file, "run:\n  steps: 5\n  resume: true\n", aside)
    assert (tmp_path / "replaced-001" / "config.yaml").read_text().count("steps: 3") == 1
    assert "steps: 5" in file.read_text()
    assert aside.describe().startswith(f"kept in {tmp_path}/replaced-001")
