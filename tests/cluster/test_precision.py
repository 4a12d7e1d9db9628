"""model.dtype=auto: bfloat16 where that is fast, what a checkpoint has, and never a guess later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.placement import GIB, Resources
from cohort.cluster.prepare import with_dtype
from cohort.learner.checkpoint import CheckpointError, Checkpoints

QUICKSTART = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "addition.yaml"


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, list(overrides))


@pytest.fixture(params=[True, False], ids=["fast-bfloat16", "slow-bfloat16"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has bfloat16 arithmetic."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cohort.cluster.prepare.bfloat16_on_this_cpu", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    ("overrides", "gpus", "slow"),
    [
        ([], 0, "float32"),
        ([], 1, "bfloat16"),
        (["cluster.device=cpu"], 1, "float32"),
        (["cluster.device=cuda"], 0, "bfloat16"),
        (["cluster.address=head:6379"], 0, "bfloat16"),
        (["cluster.address=local"], 0, "float32"),
        (["model.dtype=bfloat16"], 0, "bfloat16"),
        (["model.dtype=float32"], 1, "float32"),
    ],
)
def test_auto_is_bfloat16_where_that_is_fast(
    overrides: list[str], gpus: int, slow: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Resources(cpus=2, gpus=gpus, memory=24 * GIB)
    monkeypatch.setattr("cohort.cluster.prepare.this_machine", lambda: machine)
    expected = "float32" if "model.dtype=float32" in overrides else "bfloat16"
    assert with_dtype(config(*overrides)).model.dtype == (expected if fast else slow)


@pytest.mark.parametrize("saved", ["bfloat16", "float32", "float16"])
def test_a_resumed_run_keeps_the_precision_of_its_checkpoint(saved: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    (checkpoints.begin(1) / "learner.json").write_text(json.dumps({"model.dtype": saved}))
    checkpoints.commit(1, {})
    run = f"run.dir={tmp_path}"
    assert with_dtype(config(run, "run.resume=true")).model.dtype == saved
    assert with_dtype(config(run, "cluster.device=cuda")).model.dtype == "bfloat16"


def test_a_checkpoint_without_a_learner_is_an_error_in_words(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    (checkpoints.begin(1) / "other").write_text("")
    checkpoints.commit(1, {})
    with pytest.raises(CheckpointError, match=r"no learner state \(learner\.json is missing\)"):
        with_dtype(config(f"run.dir={tmp_path}", "run.resume=true"))
