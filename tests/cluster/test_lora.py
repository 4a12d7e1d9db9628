"""model.lora in the driver: the config, what is refused before anything starts, the memory plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cohort.cluster.adapter_folder import starting_adapter, trained_parameters
from cohort.cluster.config import Config, ConfigError, dump_config
from cohort.cluster.config_file import load_config
from cohort.cluster.continuing import Saved, compare
from cohort.cluster.errors import RunError
from cohort.cluster.fingerprint import fingerprint
from cohort.cluster.model_folder import inspect_model, starting_weights
from cohort.cluster.placement import checkpoint_bytes, kept_bytes, learner_state, memory_needed
from cohort.cluster.prepare import prepare
from cohort.learner.adapter_files import peft_name
from cohort.learner.checkpoint import CheckpointError, Checkpoints, check_shape, export
from cohort.learner.lora_config import LoraConfig
from tests.harness.world import CONFIG

LORA = "model.lora={rank: 4, alpha: 8}"


def config(model: Path, *more: str) -> Config:
    return load_config(CONFIG, [f"model.path={model}", *more])


def adapter(folder: Path, wanted: Config, model: Path, **facts: Any) -> Path:
    """An adapter folder as a run of this config writes it."""
    from cohort.cluster.model_folder import empty_model
    from cohort.learner.lora import adapter_shapes

    lora = wanted.model.lora
    assert lora is not None
    shapes = adapter_shapes(empty_model(str(model)), lora)
    folder.mkdir(parents=True)
    tensors = {peft_name(name): torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    found = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, **facts}
    (folder / "adapter_config.json").write_text(json.dumps(found))
    return folder


def test_the_ways_to_write_it(tmp_path: Path) -> None:
    given = load_config(None, ["model.path=m", "model.lora.rank=8", "model.lora.targets=[q_proj]"])
    assert given.model.lora == LoraConfig(rank=8, targets=["q_proj"])
    assert load_config(None, ["model.path=m"]).model.lora is None
    assert load_config(None, ["model.path=m", "model.lora={}"]).model.lora == LoraConfig()
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(given))
    assert load_config(file) == given
    file.write_text("model:\n  path: m\n  lora:\n    rank: 8\n    targets: [q_proj]\n")
    assert load_config(file) == given
    assert load_config(file, ["model.lora=null"]).model.lora is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.lora.rank=0", r"^model\.lora\.rank: .* greater than or equal to 1"),
        ("model.lora.alpha=0", r"^model\.lora\.alpha: "),
        ("model.lora.ranc=8", r"^model\.lora\.ranc: unknown key"),
        ("model.lora.targets=q_proj", r"^model\.lora\.targets: .* list"),
        ("model.lora=8", r"^model\.lora: "),
    ],
)
def test_mistakes_name_the_key(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.path=m", given])


def test_float8_does_not_go_with_it() -> None:
    with pytest.raises(ConfigError, match=r"learner\.float8=rowwise does not apply .* model\.lora"):
        load_config(None, ["model.path=m", LORA, "learner.float8=rowwise"])


def test_what_is_trained_is_counted(tiny_model: Path) -> None:
    assert trained_parameters(config(tiny_model), str(tiny_model)) is None
    few = config(tiny_model, "model.lora={rank: 4, targets: [q_proj]}")
    shape = json.loads((tiny_model / "config.json").read_text())
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    assert trained_parameters(few, str(tiny_model)) == layers * 4 * 2 * hidden
    assert prepare(few).trained == layers * 4 * 2 * hidden


def test_targets_that_the_model_lacks_are_refused(tiny_model: Path) -> None:
    wrong = config(tiny_model, "model.lora={targets: [q_proj, w1]}")
    with pytest.raises(RunError, match=r"model\.lora\.targets: .* no linear layer w1; it has down"):
        prepare(wrong)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """A folder of one, a checkpoint of a run with adapters, its run directory."""
    wanted = config(tiny_model, LORA)
    alone = adapter(tmp_path / "alone", wanted, tiny_model)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    begun = checkpoints.begin(3)
    shutil.copytree(tiny_model, begun / "hf")
    adapter(begun / "adapter", wanted, tiny_model)
    saved = checkpoints.commit(3, {})
    for given, found in (
        (alone, alone),
        (tmp_path / "run", saved / "adapter"),
        (saved, saved / "adapter"),
    ):
        start = config(tiny_model, LORA, f"model.init_from={given}")
        assert starting_adapter(start) == found.resolve()
        assert prepare(start).init_from == found.resolve()
    # Without model.lora: the merged weights.
    plain = config(tiny_model, f"model.init_from={tmp_path / 'run'}")
    assert starting_weights(plain) == (saved / "hf").resolve()


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    wanted = config(tiny_model, LORA)
    start = f"model.init_from={adapter(tmp_path / 'a', wanted, tiny_model)}"
    with pytest.raises(RunError, match=r"model\.init_from=.*rank=4 .* this run has .*rank=2"):
        prepare(config(tiny_model, "model.lora={rank: 2, alpha: 8}", start))
    few = "model.lora={rank: 4, alpha: 8, targets: [v_proj]}"
    with pytest.raises(
        RunError, match=r"model\.init_from=.*other model\.lora\.targets: .*down_pro"
    ):
        prepare(config(tiny_model, few, start))
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    shape = json.loads((other / "config.json").read_text())
    shape["intermediate_size"] *= 2
    (other / "config.json").write_text(json.dumps(shape))
    with pytest.raises(RunError, match=r"model\.init_from=.*an adapter of another model"):
        starting_adapter(config(other, LORA, start))
    with pytest.raises(RunError, match=r"model\.init_from=.*must name an adapter.*set model\.path"):
        prepare(config(tiny_model, LORA, f"model.init_from={tiny_model}"))
    with pytest.raises(RunError, match=r"model\.init_from=.*only an adapter .*set model\.lora"):
        prepare(config(tiny_model, start))


def test_another_rank_is_not_resumed(tiny_model: Path, tmp_path: Path) -> None:
    """By the table of differences, and by the learner where a run insists."""
    before = prepare(config(tiny_model, LORA, f"run.dir={tmp_path}"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    begun = checkpoints.begin(2)
    facts = {
        "learner.workers": 1, "learner.zero_stage": 1, "model.dtype": before.config.model.precision,
        "model.lora": {"rank": 4, "alpha": 8.0, "targets": []}, "updates_done": 2,
    }  # fmt: skip
    (begun / "learner.json").write_text(json.dumps(facts))
    now = fingerprint(before.config, before.model_path, before.task, before.rewards)
    saved = Saved.load(checkpoints.commit(2, {"step": 2, "fingerprint": now}))
    assert compare(before.config, saved, now) == ""
    for lora in (
        "{rank: 2, alpha: 8}",
        "{rank: 4}",
        "{rank: 4, alpha: 8, targets: [q_proj]}",
        "null",
    ):
        other = prepare(config(tiny_model, f"model.lora={lora}", f"run.dir={tmp_path}"))
        changed = fingerprint(other.config, other.model_path, other.task, other.rewards)
        with pytest.raises(RunError, match=r"model\.lora +\{'rank': 4.* other weights are trained"):
            compare(other.config, saved, changed)
        run = other.config.run.model_copy(update={"allow_changed": ["model.lora"]})
        insisting = other.config.model_copy(update={"run": run})
        with pytest.raises(
            CheckpointError, match=r"with model\.lora=\{\"rank\": 4.*model\.path=.*hf"
        ):
            compare(insisting, saved, changed)


def test_a_checkpoint_from_before_adapters_trained_all_weights(tmp_path: Path) -> None:
    facts = {"learner.workers": 1, "learner.zero_stage": 1, "model.dtype": "float32"}
    (tmp_path / "learner.json").write_text(json.dumps(facts))
    check_shape(tmp_path, 1, 1, "float32")
    with pytest.raises(CheckpointError, match=r"written with model\.lora=null, this run has"):
        check_shape(tmp_path, 1, 1, "float32", LoraConfig())


def test_frozen_weights_need_no_gradients_and_no_optimizer() -> None:
    def sized(stage: int, *more: str) -> Config:
        keys = ("learner.workers=4", f"learner.zero_stage={stage}", "model.dtype=bfloat16")
        return load_config(None, ["model.path=m", *keys, *more])

    whole, few = 10**9, 10**6
    for stage in range(4):
        found = learner_state(sized(stage), whole, few)
        assert found["weights"] == 2 * (whole + few) // (4 if stage == 3 else 1)
        assert found["gradients"] == 4 * few // (4 if stage >= 2 else 1)
        assert found["optimizer"] == 12 * few // (4 if stage >= 1 else 1)
        assert learner_state(sized(stage), whole)["optimizer"] >= 100 * found["optimizer"]
    # Two copies of what moves, the merged weights of a checkpoint; no second model for the KL.
    assert kept_bytes(sized(1), whole, few) == 2 * (2 + 12) * few + 2 * whole
    assert kept_bytes(sized(1), whole) == 2 * (2 + 12) * whole + 2 * whole
    assert checkpoint_bytes(sized(1), whole, few) == 2 * whole + (2 + 2 + 12) * few
    with_kl = sized(1, "algorithm.kl_coef=0.1")
    assert memory_needed(with_kl, whole, few)["reference"] == 0
    assert memory_needed(with_kl, whole)["reference"] == 4 * 2 * whole


def test_export_writes_the_model_or_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    begun = checkpoints.begin(1)
    shutil.copytree(tiny_model, begun / "hf")
    adapter(begun / "adapter", config(tiny_model, LORA), tiny_model)
    checkpoints.commit(1, {})
    merged = export(tmp_path / "run", tmp_path / "merged")
    alone = export(tmp_path / "run", tmp_path / "alone", adapter=True)
    assert inspect_model(config(merged))[2] == inspect_model(config(tiny_model))[2]
    assert sorted(path.name for path in alone.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    shutil.rmtree(tmp_path / "run")
    begun = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    shutil.copytree(tiny_model, begun.begin(1) / "hf")
    begun.commit(1, {})
    with pytest.raises(
        CheckpointError, match=r"holds no adapter: the run trained without model\.l"
    ):
        export(tmp_path / "run", tmp_path / "again", adapter=True)
    assert not (tmp_path / "again").exists()
