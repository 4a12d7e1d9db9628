"""What can be known to be wrong is said at once: one message, no actor, nothing written.

The commands run inside this process, so that torch and transformers are imported once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from cohort.cluster.cli import app
from tests.system.conftest import Cohort

pytestmark = pytest.mark.system


def train(cohort: Cohort, monkeypatch: pytest.MonkeyPatch, **overrides: object) -> Any:
    monkeypatch.chdir(cohort.folder)
    [_, *arguments] = cohort.arguments("train", **overrides)
    # An exception that is not meant for people would surface here instead of in the output.
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        ({"model__path": "/no/such/model"}, 1, "model.path=/no/such/model: there is no such"),
        ({"model__path": "."}, 1, "holds no config.json"),
        ({"task__name": "adition"}, 1, "addition"),
        ({"task__name": "nowhere.tasks:Mine"}, 1, "nowhere"),
        ({"task__options": "{max_operant: 3}"}, 1, "max_operand"),
        ({"rewards__functions": "[judge.py:digitz]"}, 1, "digits"),
        ({"rewards__functions": "[nothing.py:f]"}, 1, "nothing.py"),
        ({"actors__count": 99}, 1, "actors.count=99"),
        ({"learner__workers": 4, "task__prompts_per_step": 99}, 2, "learner.workers=4"),
        ({"actors__kv_cache_gib": 9000}, 1, "actors.kv_cache_gib"),
        ({"model__max_length": 20}, 1, "model.max_length"),
        ({"model__max_length": 5000}, 1, "exceeds the model's context of 1024"),
        ({"cluster__device": "cuda"}, 1, "GPUs: needs 2"),
        ({"cluster__address": "127.0.0.1:1"}, 75, "cluster.address=127.0.0.1:1"),
        ({"actors__cuont": 2}, 2, "did you mean actors.count?"),
        ({"actors__count": "many"}, 2, "actors.count"),
    ],
)
def test_wrong_settings(
    cohort: Cohort,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, object],
    code: int,
    message: str,
) -> None:
    run = cohort.folder / "never"
    result = train(cohort, monkeypatch, **{"run__dir": run, **overrides})
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert not run.exists()
    assert not ray.is_initialized()


def test_prompts_longer_than_the_context(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i} " * (2000 if i == 3 else 5), "answer": i} for i in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = train(
        cohort, monkeypatch, run__dir=tmp_path / "run", task__name="dataset", task__data=data
    )
    assert result.exit_code == 1
    assert "1 of 20 prompts are longer than 1012 tokens" in result.stderr
    assert "task.overlong=drop" in result.stderr
    assert not (tmp_path / "run").exists()


def test_run_directories_that_cannot_be_used(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "config.yaml").write_text("run: {}\n")
    before = sorted(tmp_path.rglob("*"))
    result = train(cohort, monkeypatch, run__dir=occupied)
    assert result.exit_code == 1
    assert "already holds a run" in result.stderr
    assert "run.resume=true" in result.stderr

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    result = train(cohort, monkeypatch, run__dir=foreign)
    assert result.exit_code == 1
    assert "holds other files and no run" in result.stderr

    # Nobody, not even root, may write here.
    result = train(cohort, monkeypatch, run__dir="/proc/cohort/run")
    assert result.exit_code == 1
    assert "run.dir=/proc/cohort/run cannot be written" in result.stderr

    (tmp_path / "file").write_text("")
    result = train(cohort, monkeypatch, run__dir=tmp_path / "file")
    assert result.exit_code == 1
    assert "is a file" in result.stderr
    assert set(before) <= set(tmp_path.rglob("*"))
