"""Loading a checkpoint runs no code out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cohort.learner.checkpoint import CheckpointError
from cohort.learner.safe_load import FORBIDDEN, FORCED, only_data


class Planted:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def load(path: Path) -> Any:
    """As DeepSpeed loads each part of a checkpoint."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    return TorchCheckpointEngine().load(str(path), map_location="cpu")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("variable", [None, FORCED, FORBIDDEN])
def test_a_planted_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, variable: str | None
) -> None:
    for name in (FORCED, FORBIDDEN):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    file, mark = tmp_path / "state.pt", tmp_path / "ran"
    state = {"weight": torch.ones(3), "more": [Planted(mark)]}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    before = {name: os.environ.get(name) for name in (FORCED, FORBIDDEN)}
    refused = pytest.raises(CheckpointError, match=r"more than tensors.*\(posix\.system\).*not")
    with refused, only_data(tmp_path):
        load(file)
    assert not mark.exists()
    assert {name: os.environ.get(name) for name in before} == before
    # It would have run without.
    if variable is None:
        load(file)
        assert mark.exists()


def test_what_deepspeed_writes_is_loaded(tmp_path: Path) -> None:
    from collections import OrderedDict

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**8, 2.0, 1000, 1.0, 1)
    state = {
        "loss_scaler": [LossScaler(scale=1.0), scaler],
        "fragments": OrderedDict(a=fragment_address(numel=3, start=1)),
        "shapes": [OrderedDict(a=torch.Size([2, 3]))],
        "moments": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, dtype=torch.bfloat16)}},
        "zero_stage": ZeroStageEnum(2),
        "steps_done": 3,
        "config": {"a": [None, True, "b", 1e-3]},
    }
    torch.save(state, tmp_path / "state.pt")
    with only_data(tmp_path):
        found = load(tmp_path / "state.pt")
    assert found["loss_scaler"][1].cur_scale == 256.0
    assert found["fragments"]["a"] == fragment_address(numel=3, start=1)
    assert found["config"] == state["config"]
