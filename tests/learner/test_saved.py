"""What is written beside the weights, tried before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig

from cohort.learner.checkpoint import CheckpointError, Checkpoints, NotFiniteError
from cohort.learner.saving import PatientEngine, Writing, require_finite, try_to_write, write_model

CONTRADICTORY = {"do_sample": False, "temperature": 0.6, "eos_token_id": 2}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.device("cpu")
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [CONTRADICTORY, {"do_sample": True, "top_k": 5}, None])
def test_generation_settings_are_copied_as_they_are(
    folder: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if settings is not None:
        file.write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.generation_config
    write_model(model, dict(model.state_dict()), folder, tmp_path / "hf")
    assert model.generation_config is before
    if settings is not None:
        assert json.loads((tmp_path / "hf" / file.name).read_text()) == settings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    if settings == CONTRADICTORY:
        # The reason for all this.
        with pytest.raises(ValueError, match="Fix these issues"):
            GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path)


def test_sampling_parameters_in_config_json_do_not_stop_a_save(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, eos_token_id=2)
    write_model(model, dict(model.state_dict()), folder, tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written["eos_token_id"] == 2
    assert "temperature" not in written


def test_the_trial_writes_what_a_checkpoint_would(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    with Checkpoints(tmp_path / "c", keep=1).trial() as trial:
        for rank in (0, 1):
            try_to_write(model, folder, trial, rank)
        names = {path.name for path in (trial / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names


def test_what_cannot_be_saved_is_refused_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("this config is not JSON serializable")

    monkeypatch.setattr(type(model.config), "save_pretrained", refuse)
    with (
        Checkpoints(tmp_path / "c", keep=1).trial() as trial,
        pytest.raises(CheckpointError, match=r"a trial of saving .* not JSON serializable"),
    ):
        try_to_write(model, folder, trial, 0)


def test_a_rank_that_does_not_see_run_dir_says_so(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="learner rank 1 does not see"):
        try_to_write(model, folder, tmp_path / "elsewhere", 1, wait_s=0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_found(alone: Any, bad: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    require_finite(model, alone)
    with torch.no_grad():
        model[1].bias[1] = bad
    with pytest.raises(NotFiniteError, match="are not saved"):
        require_finite(model, alone)


def test_errors_of_writing_wait_until_all_ranks_are_through(alone: Any) -> None:
    class Disk:
        def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: ARG002
            raise OSError(28, "No space left on device")

        def save(self, state_dict: Any, path: str) -> None:  # noqa: ARG002
            raise RuntimeError("PytorchStreamWriter failed writing file")

        def is_decoupled(self) -> bool:
            return False

    class Engine:
        checkpoint_engine: Any = Disk()

    engine = Engine()
    own = engine.checkpoint_engine
    with PatientEngine(engine) as writing:
        engine.checkpoint_engine.makedirs("x", exist_ok=True)
        engine.checkpoint_engine.save({}, "x")
        assert engine.checkpoint_engine.is_decoupled() is False
    assert engine.checkpoint_engine is own
    with pytest.raises(CheckpointError, match="No space left on device"):
        writing.agree(alone)
    Writing().agree(alone)
