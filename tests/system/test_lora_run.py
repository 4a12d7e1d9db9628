"""A whole run that trains adapters, with real engines, and what it exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.system.conftest import COHORT, Cohort
from tests.system.runs import rows

pytestmark = [pytest.mark.system, pytest.mark.exhaustive]
# Before the names of adapters, in PEFT's files.
PREFIX = "base_model.model."


def test_a_run_trains_adapters_and_exports_both_forms(cohort: Cohort, tmp_path: Path) -> None:
    """Engines prove to hold the merged weights in every step, or the run would end."""
    folder = tmp_path / "run"
    keys: dict[str, object] = {
        "model__lora": "{rank: 4, alpha: 8}",
        "learner__learning_rate": 1e-2,
        "algorithm__kl_coef": 0.01,
        "run__dir": folder,
    }
    result = cohort.train(run__steps=3, **keys)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in rows(folder)] == [0, 1, 2]
    for option, out in (((), tmp_path / "whole"), (("--adapter",), tmp_path / "alone")):
        done = cohort.run(COHORT, "export", str(folder), str(out), *option)
        assert done.returncode == 0, done.stdout + done.stderr
    base = load_file(cohort.model / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    adapter = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert whole.keys() == base.keys()
    moved = [name for name in base if not torch.equal(whole[name], base[name])]
    assert len(moved) == len(adapter) / 2 > 0
    for name in moved:
        a, b = (adapter[f"{PREFIX}{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(whole[name], base[name] + 2 * b @ a)

    refused = cohort.train(run__steps=4, run__resume="true", **{**keys, "model__lora": "{rank: 2}"})
    assert refused.returncode != 0
    assert "model.lora" in refused.stderr
    resumed = cohort.train(run__steps=4, run__resume="true", **keys)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3]
