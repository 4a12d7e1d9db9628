"""Real ranks under DeepSpeed are killed and frozen: what they train is, to the bit, the same."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cohort.learner.config import AlgorithmConfig
from cohort.learner.learner import Learner
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

# The reference is refreshed after two steps, and is part of the state from then on.
ALGORITHM = AlgorithmConfig(updates_per_step=2, kl_coef=0.05, reference_refresh_steps=2)
# Before which step what happens to the last rank; and, after step 2, to the first one.
KILLED, ALL = {1: signal.SIGKILL}, {1: signal.SIGKILL, 2: None, 3: signal.SIGSTOP}
SHAPES = [
    (2, 1, "bfloat16", KILLED),
    *(
        pytest.param(*shape, ALL, marks=pytest.mark.exhaustive)
        for shape in [
            (1, 0, "float32"),
            (1, 3, "float32"),
            (2, 0, "bfloat16"),
            (2, 1, "bfloat16"),
            (2, 2, "float32"),
            (2, 3, "bfloat16"),
            (3, 3, "float32"),
        ]
    ),
]


async def pids(group: Learner) -> list[int]:
    return [place.pid for place in group._gang._places]  # type: ignore[union-attr]


@pytest.mark.parametrize(("ranks", "stage", "dtype", "faults"), SHAPES)
def test_killed_and_frozen_ranks_change_nothing(
    run: Any,
    models: dict[str, Path],
    tmp_path: Path,
    ranks: int,
    stage: int,
    dtype: str,
    faults: dict[int, int | None],
) -> None:
    steps = max(faults) + 1

    async def train(name: str, faults: dict[int, int | None]) -> tuple[Any, list[float]]:
        shm = Path("/dev/shm") / f"cohort-learner-{os.getpid()}-{name}"
        spec = spec_for(
            models["llama-tied"], ranks, shm, zero_stage=stage, dtype=dtype, learning_rate=1e-2
        )
        # The policy starts from other weights than the reference's.
        other = models["llama-other"]
        spec = replace(
            spec, algorithm=ALGORITHM, log_dir=str(tmp_path / name), init_from=str(other)
        )
        group = await start(spec)
        losses = []
        try:
            own = load_file(other / "model.safetensors")
            for weight_name, weight in (await weights(group)).items():
                assert weight.equal(own[weight_name].to(weight.dtype))
            for step in range(steps):
                # A stopped process takes no part in the step; a killed one is gone before it.
                if (number := faults.get(step)) is not None:
                    os.kill((await pids(group))[-1], number)
                result = await group.step([put(g) for g in batch()])
                losses.append(result.loss)
                if step == 0:
                    assert result.reference_kl > 0.1
                if step in faults and number is None:
                    os.kill((await pids(group))[0], signal.SIGKILL)
                await group.publish()
            assert group.restarts == len(faults)
            assert result.version == steps
            return await weights(group), losses
        finally:
            group.kill()
            await removed(shm)

    async def both() -> None:
        (straight, losses), (broken, again) = await train("straight", {}), await train("b", faults)
        assert losses == again
        assert straight.keys() == broken.keys()
        assert all(straight[name].equal(broken[name]) for name in straight)

    run(both())
