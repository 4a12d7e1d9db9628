"""What real ranks have written from their copies is, to the bit, what they would have written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cohort.learner.config import AlgorithmConfig
from tests.learner.test_copies import same
from tests.system.test_learner import (
    batch,
    cluster,
    models,
    put,
    removed,
    run,
    spec_for,
    start,
    weights,
)

__all__ = ["cluster", "models", "run"]
pytestmark = pytest.mark.system

# The reference is refreshed after a step, and is part of a checkpoint from then on.
ALGORITHM = AlgorithmConfig(kl_coef=0.05, reference_refresh_steps=1)


def same_files(behind: Path, plain: Path) -> None:
    """The same files with the same contents; of DeepSpeed's, the same objects."""
    names = [
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (behind, plain)
    ]
    assert names[0] == names[1]
    assert [name for name in names[0] if name.suffix == ".pt"]
    for name in names[0]:
        if name.suffix != ".pt":
            assert (behind / name).read_bytes() == (plain / name).read_bytes(), name
            continue
        one, other = (torch.load(folder / name, weights_only=False) for folder in (behind, plain))
        assert same(without_scaler(one), without_scaler(other)), name
        sizes = [(folder / name).stat().st_size for folder in (behind, plain)]
        assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[1] + 10_000, name


def without_scaler(state: Any) -> Any:
    """An object that has no equality is compared by what it holds."""
    if isinstance(state, dict):
        return {key: without_scaler(value) for key, value in state.items()}
    if isinstance(state, list):
        return [without_scaler(value) for value in state]
    return vars(state) if type(state).__name__ == "LossScaler" else state


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype"),
    [
        (2, 1, "bfloat16"),
        pytest.param(1, 3, "float32", marks=pytest.mark.exhaustive),
        pytest.param(1, 0, "float32", marks=pytest.mark.exhaustive),
        pytest.param(2, 3, "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_checkpoint_written_behind_is_the_one_written_in_the_foreground(
    run: Any, models: dict[str, Path], tmp_path: Path, ranks: int, stage: int, dtype: str
) -> None:
    shm = Path("/dev/shm") / f"cohort-learner-{os.getpid()}-behind"
    spec = spec_for(
        models["llama-tied"], ranks, shm, zero_stage=stage, dtype=dtype, learning_rate=1e-2
    )
    behind, plain = tmp_path / "behind", tmp_path / "plain"
    for folder in (behind, plain):
        folder.mkdir()

    async def check() -> None:
        group = await start(replace(spec, algorithm=ALGORITHM, log_dir=str(tmp_path / "logs")))

        async def step() -> None:
            assert (await group.step([put(g) for g in batch()])).applied

        async def steps_from(folder: Path) -> dict[str, torch.Tensor]:
            assert await group.load(folder) == 2
            await step()
            return await weights(group)

        try:
            assert await group.save_behind(behind) is None
            for _ in range(2):
                await step()
            await group.save(plain)
            writing = await group.save_behind(behind)
            assert writing is not None
            # The second of these copies its state to where the checkpoint is written from.
            for _ in range(2):
                await step()
            assert group.version == 4
            await writing
            same_files(behind, plain)
            assert not (shm / "copies" / "beside").exists()
            one, other = await steps_from(behind), await steps_from(plain)
            assert one.keys() == other.keys()
            assert all(one[name].equal(other[name]) for name in one)
        finally:
            group.kill()
            await removed(shm)

    run(check())
