"""Resources are compared before anything starts; messages name keys and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cohort.cluster.config import Config
from cohort.cluster.placement import (
    GIB,
    PlacementError,
    Resources,
    memory_needed,
    object_store_bytes,
    plan,
    this_machine,
)

LAPTOP = Resources(cpus=2, gpus=0, memory=20 * GIB)
SMALL_MODEL = 135_000_000


def config(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, **sections})


def test_the_quickstart_fits_a_laptop_and_reservations_fill_at_most_its_cores() -> None:
    wide = config(
        actors={"count": 2}, learner={"workers": 2, "zero_stage": 2}, rewards={"workers": 8}
    )
    placement = plan(wide, LAPTOP, SMALL_MODEL)
    assert placement.device == "cpu"
    reserved = (
        2 * placement.rollout["num_cpus"]
        + 2 * placement.learner["num_cpus"]
        + 8 * placement.reward["num_cpus"]
    )
    assert reserved <= 2
    assert "num_gpus" not in placement.rollout


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"actors": {"count": 3}}, "actors.count=3: .* there are 2"),
        ({"learner": {"workers": 8}}, "learner.workers=8"),
        ({"actors": {"tensor_parallel": 2}}, "actors.tensor_parallel"),
        ({"actors": {"kv_cache_gib": 30}}, r"about 40\.\d GiB \(engines .* 20\.0 GiB"),
        ({"learner": {"offload": "optimizer"}}, "learner.offload=optimizer"),
        ({"cluster": {"device": "cuda"}}, "GPUs: needs 2 .* there are 0"),
    ],
)
def test_what_does_not_fit_is_said_with_numbers_and_keys(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        plan(config(**sections), LAPTOP, SMALL_MODEL)


@pytest.mark.parametrize("able", [True, False])
def test_float16_needs_a_cpu_that_knows_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cohort.cluster.placement.float16_on_this_cpu", lambda: able)
    wanted = config(model={"path": "m", "dtype": "float16"})
    if able:
        assert plan(wanted, LAPTOP, SMALL_MODEL).device == "cpu"
        return
    with pytest.raises(PlacementError, match=r"model\.dtype=float16: this CPU .* use bfloat16"):
        plan(wanted, LAPTOP, SMALL_MODEL)
    # GPUs have it.
    assert plan(wanted, Resources(16, 8, 500 * GIB), SMALL_MODEL).device == "cuda"


def test_gpus_are_counted_for_engines_and_ranks() -> None:
    wanted = config(actors={"count": 2, "tensor_parallel": 2}, learner={"workers": 4})
    node = Resources(cpus=64, gpus=8, memory=500 * GIB)
    placement = plan(wanted, node, SMALL_MODEL)
    assert placement.device == "cuda"
    assert placement.rollout["num_gpus"] == 2
    assert placement.learner["num_gpus"] == 1
    with pytest.raises(PlacementError, match="GPUs: needs 8"):
        plan(wanted, Resources(64, 7, 500 * GIB), SMALL_MODEL)
    with pytest.raises(PlacementError, match="CPUs: needs 7"):
        plan(wanted, Resources(6, 8, 500 * GIB), SMALL_MODEL)


def test_zero_stages_save_memory_in_their_order() -> None:
    needs = [
        memory_needed(config(learner={"workers": 4, "zero_stage": stage}), 10**9)["learner"]
        for stage in range(4)
    ]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4
    # The ZeRO paper's accounting plus a float32 gradient: stage 0 holds it all on every rank.
    overhead = needs[0] - 4 * (12 + 4 + 2) * 10**9
    assert 0 < overhead < 8 * GIB


def test_the_reference_needs_memory_only_when_there_is_one() -> None:
    def need(**algorithm: Any) -> int:
        with_ranks = config(learner={"workers": 2, "zero_stage": 2}, algorithm=algorithm)
        return memory_needed(with_ranks, 10**9)["reference"]

    assert need() == 0
    assert need(kl_coef=0.1) == 2 * 2 * 10**9


def test_a_container_gets_what_its_cgroup_allows(tmp_path: Path) -> None:
    """A quota of one and a half cores, and 3 GiB of which 1 is used, on any machine."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/self/mountinfo").write_text("1 2 0:3 / /cg rw - cgroup2 cgroup rw\n")
    (tmp_path / "cg/box").mkdir(parents=True)
    for name, text in {
        "cpu.max": "150000 100000",
        "memory.max": str(3 * GIB),
        "memory.current": str(GIB),
    }.items():
        (tmp_path / "cg/box" / name).write_text(text)
    free = this_machine(tmp_path / "nothing")
    have = this_machine(tmp_path)
    assert (have.cpus, have.memory) == (1, min(2 * GIB, free.memory))
    assert "3.0 of its" in have.limited
    with pytest.raises(PlacementError, match=r"may use .*3\.0 of its .* memory\):\nmemory:"):
        plan(config(), have, SMALL_MODEL)
    with pytest.raises(PlacementError, match=r"actors.count=2: .* there are 1"):
        plan(config(actors={"count": 2}), have, SMALL_MODEL)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_small_shared_memory_is_refused(device: str) -> None:
    """Docker's default of 64 MiB; two versions of the weights beside Ray's objects."""
    node = Resources(cpus=64, gpus=8, memory=500 * GIB, shared_memory=64 * 2**20)
    wanted = config(cluster={"device": device})
    with pytest.raises(PlacementError, match=r"/dev/shm: two versions .* --shm-size"):
        plan(wanted, node, SMALL_MODEL)
    # Twice the weights for engines, twice weights and optimizer as copies of the learner's state,
    # and the weights once more, for checkpoints that are written from them.
    need = (4 + 2 * (2 + 12) + 2) * SMALL_MODEL
    assert plan(wanted, replace(node, shared_memory=need + GIB), SMALL_MODEL).device == device
    assert plan(wanted, replace(node, shared_memory=None), SMALL_MODEL).device == device
    with pytest.raises(PlacementError, match="--shm-size"):
        plan(wanted, replace(node, shared_memory=need + 10**6), SMALL_MODEL)
    without = config(cluster={"device": device}, learner={"keep_copy": False})
    room = replace(node, shared_memory=4 * SMALL_MODEL + GIB)
    assert plan(without, room, SMALL_MODEL).device == device
    with pytest.raises(PlacementError, match=r"learner.keep_copy=false"):
        plan(wanted, room, SMALL_MODEL)


def test_the_object_store_leaves_room_for_weights() -> None:
    stores = {
        shared: object_store_bytes(Resources(2, 0, GIB, shared))
        for shared in (None, 64 * 2**20, GIB, 20 * GIB)
    }
    assert list(stores.values()) == [512 * 2**20, 80 * 2**20, 256 * 2**20, 512 * 2**20]
