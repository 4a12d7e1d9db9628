"""A checkpoint of some ranks and a ZeRO stage, loaded by other ranks under another stage."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cohort.learner.reshape import KINDS, WholeState, gather
from cohort.learner.safe_load import only_data
from tests.system.test_learner import batch, cluster, models, put, run, spec_for, start, weights

__all__ = ["cluster", "models", "run"]
pytestmark = pytest.mark.system

# Each shape loads what the one before has saved: from ZeRO-1 and 2 to 3 and back, to more ranks
# and to fewer.
CHAINS = [
    pytest.param("bfloat16", [(2, 1), (1, 3)]),
    pytest.param("bfloat16", [(1, 3), (3, 2), (2, 1)], marks=pytest.mark.exhaustive),
    pytest.param(
        "float32",
        [(3, 3), (2, 2), (1, 1), (3, 1), (2, 3), (3, 3)],
        marks=pytest.mark.exhaustive,
    ),
    pytest.param("bfloat16", [(3, 1), (2, 3), (1, 2)], marks=pytest.mark.exhaustive),
]


def whole_state(checkpoint: Path, ranks: int, stage: int) -> WholeState:
    with only_data(checkpoint):
        return gather(checkpoint / "deepspeed" / "state", ranks, stage)


@pytest.mark.parametrize(("dtype", "chain"), CHAINS)
def test_weights_and_moments_are_the_same_in_every_shape(
    run: Any, models: dict[str, Path], tmp_path: Path, dtype: str, chain: list[tuple[int, int]]
) -> None:
    async def check() -> None:
        published, losses = [], []
        for number, (ranks, stage) in enumerate(chain):
            spec = spec_for(
                models["llama-tied"], ranks, tmp_path / f"shm{number}", zero_stage=stage,
                dtype=dtype, learning_rate=1e-2,
            )  # fmt: skip
            group = await start(spec)
            try:
                if number == 0:
                    for _ in range(2):
                        await group.step([put(g) for g in batch()])
                else:
                    assert await group.load(tmp_path / str(number - 1)) == 2
                published.append(await weights(group))
                folder = tmp_path / str(number)
                folder.mkdir()
                await group.save(folder)
                result = await group.step([put(g) for g in batch()])
                assert (result.applied, result.version) == (True, 3)
                losses.append(result.loss)
            finally:
                group.kill()
        states = [whole_state(tmp_path / str(n), *shape) for n, shape in enumerate(chain)]
        for one, other in pairwise(states):
            assert one.updates == other.updates == 2
            assert one.parameters.keys() == other.parameters.keys()
            for name, kinds in one.parameters.items():
                for kind in KINDS:
                    assert kinds[kind].equal(other.parameters[name][kind]), (name, kind)
        for one, other in pairwise(published):
            assert all(one[name].equal(other[name]) for name in one)
        assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02, abs=1e-3)

    run(check())
