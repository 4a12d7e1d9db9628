"""model.init_from: which weights a run starts from, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from cohort.cluster.commands import evaluate as evaluating
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.errors import RunError
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.model_folder import starting_weights
from cohort.cluster.observe.console import Console
from cohort.cluster.prepare import Prepared, prepare
from cohort.learner.checkpoint import Checkpoints
from tests.harness.world import CONFIG


@pytest.fixture
def earlier(tmp_path: Path, tiny_model: Path) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "earlier" / "checkpoints", keep=5)
    for step in (1, 2):
        shutil.copytree(tiny_model, checkpoints.begin(step) / "hf")
        checkpoints.commit(step, {"step": step})
    return tmp_path / "earlier"


def config(model: Path, start: Path, *more: str) -> Config:
    return load_config(CONFIG, [f"model.path={model}", f"model.init_from={start}", *more])


def test_a_run_a_checkpoint_and_an_exported_folder_name_their_weights(
    tiny_model: Path, earlier: Path
) -> None:
    newest, first = earlier / "checkpoints" / "step-2", earlier / "checkpoints" / "step-1"
    for given, found in (
        (earlier, newest / "hf"),
        (first, first / "hf"),
        (first / "hf", first / "hf"),
    ):
        assert starting_weights(config(tiny_model, given)) == found.resolve()


def test_what_names_no_weights_is_refused(tiny_model: Path, earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"model.init_from=.*no run directory, checkpoint or folder"):
        starting_weights(config(tiny_model, tmp_path))
    (earlier / "checkpoints" / "step-2" / "COMPLETE").unlink()
    with pytest.raises(RunError, match=r"model.init_from=.*not complete"):
        starting_weights(config(tiny_model, earlier / "checkpoints" / "step-2"))
    shutil.rmtree(earlier / "checkpoints" / "step-1")
    with pytest.raises(RunError, match=r"model.init_from=.*no complete checkpoint"):
        starting_weights(config(tiny_model, earlier))


def test_another_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    shape = json.loads((other / "config.json").read_text())
    shape["intermediate_size"] *= 2
    (other / "config.json").write_text(json.dumps(shape))
    with pytest.raises(RunError, match=r"another model than model.path.*mlp"):
        starting_weights(config(tiny_model, other))


def test_the_fingerprint_records_the_weights_and_a_resumed_run_needs_them_no_more(
    tiny_model: Path, earlier: Path, tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'new'}"
    prepared = prepare(config(tiny_model, earlier, run))
    assert prepared.init_from == (earlier / "checkpoints" / "step-2" / "hf").resolve()
    assert prepared.model_path == str(tiny_model)
    found = fingerprint(
        prepared.config, prepared.model_path, prepared.task, prepared.rewards, prepared.init_from
    )
    assert found["init_from"]["folder"] == str(prepared.init_from)
    assert "model.safetensors" in found["init_from"]
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", keep=1)
    begun = checkpoints.begin(1)
    shutil.copytree(tiny_model, begun / "hf")
    (begun / "learner.json").write_text(json.dumps({"model.dtype": "float32"}))
    checkpoints.commit(1, {})
    start = config(tiny_model, earlier, run, "run.resume=true")
    shutil.rmtree(earlier)
    assert prepare(start).init_from is None


@pytest.mark.parametrize("key", ["model.init_from={earlier}", "model.lora={{rank: 2}}"])
def test_an_evaluated_checkpoint_is_scored_as_it_is(
    key: str, tiny_model: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its run has started from: that is in the config beside it."""
    seen: list[Prepared] = []

    def prepared(given: Config) -> Prepared:
        seen.append(prepare(given))
        raise RunError("enough")

    monkeypatch.setattr(evaluating, "prepare", prepared)
    trained = earlier / "checkpoints" / "step-1" / "hf"
    given = load_config(CONFIG, [f"model.path={tiny_model}", key.format(earlier=earlier)])
    with Console(1, "plain") as console, pytest.raises(RunError, match="enough"):
        asyncio.run(evaluating.evaluate(given, trained, console))
    assert (seen[0].model_path, seen[0].init_from, seen[0].trained) == (str(trained), None, None)
