"""Copies of a rank's state: written whole or not at all, read back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cohort.learner.checkpoint import CheckpointError
from cohort.learner.copies import Copies, MemoryWriter

FILE = "state.pt"


def a_state(seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "module": {"embed": weight, "head": weight, "empty": torch.empty(0, 3)},
        "optimizer": [{"step": torch.tensor(3.0 + seed), "lr": 1e-3, "betas": (0.9, 0.99)}],
        "short": weight.to(torch.bfloat16).t(),
        "flag": torch.tensor([True, False]),
    }


def write(copies: Copies, generation: int, fails: bool = False) -> None:
    with copies.writing(generation) as writer:
        place = copies.place(generation)
        place.mkdir(parents=True, exist_ok=True)
        writer.save(a_state(generation), str(place / FILE))
        if fails:
            raise OSError("no space left")


def read(copies: Copies, generation: int) -> dict[str, object]:
    copies.require(generation)
    found = MemoryWriter({}).load(str(copies.place(generation) / FILE))
    assert isinstance(found, dict)
    return found


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        assert isinstance(other, list)
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def test_a_copy_is_read_back_to_the_bit_by_a_rank_that_comes_after(tmp_path: Path) -> None:
    write(Copies(tmp_path, 0), 1)
    assert same(read(Copies(tmp_path, 0), 1), a_state(1))


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 0)
    write(copies, 1)
    found = read(copies, 1)
    write(copies, 3)
    assert same(found, a_state(1))


def test_tied_weights_take_their_place_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 100)
    MemoryWriter({}).save({"a": weight, "b": weight.detach()}, str(tmp_path / FILE))
    assert (tmp_path / FILE).stat().st_size < 1.1 * weight.nbytes


@pytest.mark.parametrize("fails", [True, False])
def test_a_copy_that_is_being_written_leaves_the_one_before(tmp_path: Path, fails: bool) -> None:
    copies = Copies(tmp_path, 0)
    write(copies, 1)
    if fails:
        with pytest.raises(OSError, match="no space"):
            write(copies, 2, fails=True)
        with pytest.raises(CheckpointError, match="no copy 2"):
            copies.require(2)
    else:
        write(copies, 2)
        assert same(read(copies, 2), a_state(2))
    assert same(read(Copies(tmp_path, 0), 1), a_state(1))


def test_an_older_copy_in_the_same_place_is_not_taken_for_a_newer(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 0)
    write(copies, 1)
    with pytest.raises(CheckpointError, match="copy 3"):
        copies.require(3)


def test_a_copy_that_began_over_an_older_one_is_neither(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 0)
    write(copies, 1)
    with pytest.raises(OSError, match="no space"):
        write(copies, 3, fails=True)
    for generation in (1, 3):
        with pytest.raises(CheckpointError, match="no copy"):
            copies.require(generation)


@pytest.mark.parametrize("name", [FILE, f"{FILE}.index"])
def test_a_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    copies = Copies(tmp_path, 0)
    write(copies, 1)
    file = copies.place(1) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        copies.require(1)


def test_ranks_do_not_touch_one_anothers(tmp_path: Path) -> None:
    write(Copies(tmp_path, 0), 1)
    with pytest.raises(CheckpointError, match="rank 1 has no copy"):
        Copies(tmp_path, 1).require(1)
