"""A checkpoint's files from a copy: whole and as they were, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cohort.learner import behind
from cohort.learner.behind import BESIDE, LISTING
from cohort.learner.checkpoint import CheckpointError, sizes_in
from cohort.learner.copies import Copies
from tests.learner.test_copies import a_state, same

ALIKE, OWN = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
GENERATION = 5


def a_copy(folder: Path, rank: int = 0) -> Copies:
    """What a rank and `behind.prepare` leave."""
    copies = Copies(folder / "copies", rank)
    with copies.writing(GENERATION) as writer:
        place = copies.place(GENERATION)
        place.mkdir(parents=True)
        for name in (ALIKE, OWN):
            writer.save(a_state(len(name)), str(place / name))
    (copies.folder / "zero_to_fp32.py").write_text("a program")
    beside = copies.folder / BESIDE
    (beside / "hf").mkdir(parents=True)
    (beside / "hf" / "model.safetensors").write_bytes(b"weights")
    (beside / "learner.json").write_text("{}")
    (copies.folder / LISTING).write_text(json.dumps(sizes_in(beside)))
    return copies


def test_all_that_a_checkpoint_has_is_written(tmp_path: Path) -> None:
    copies, target = a_copy(tmp_path), tmp_path / "checkpoint"
    behind.write(copies, GENERATION, 0, target)
    assert sorted(sizes_in(target)) == [
        f"deepspeed/state/{ALIKE}",
        f"deepspeed/state/{OWN}",
        "deepspeed/zero_to_fp32.py",
        "hf/model.safetensors",
        "learner.json",
    ]
    for name in (ALIKE, OWN):
        assert same(torch.load(target / "deepspeed" / "state" / name), a_state(len(name)))
    # The memory is free again.
    assert not (copies.folder / BESIDE).exists()


def test_what_all_ranks_hold_alike_is_rank_0s(tmp_path: Path) -> None:
    copies, target = a_copy(tmp_path, rank=1), tmp_path / "checkpoint"
    behind.write(copies, GENERATION, 1, target)
    assert list(sizes_in(target)) == [f"deepspeed/state/{OWN}"]
    assert (copies.folder / BESIDE).exists()


def damage_copy(copies: Copies) -> None:
    (copies.place(GENERATION) / OWN).write_bytes(b"x")


def lose_weights(copies: Copies) -> None:
    (copies.folder / BESIDE / "hf" / "model.safetensors").unlink()


def cut_weights(copies: Copies) -> None:
    (copies.folder / BESIDE / "hf" / "model.safetensors").write_bytes(b"weig")


def lose_all(copies: Copies) -> None:
    for path in (*copies.place(GENERATION).iterdir(), copies.folder / LISTING):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_copy, "copy 5 .* damaged"),
        (lose_weights, "not whole"),
        (cut_weights, "not whole"),
        (lose_all, "no copy 5"),
    ],
)
def test_what_is_not_whole_is_not_written_as_if_it_were(
    tmp_path: Path, damage: Callable[[Copies], None], message: str
) -> None:
    copies = a_copy(tmp_path)
    damage(copies)
    with pytest.raises(CheckpointError, match=message):
        behind.write(copies, GENERATION, 0, tmp_path / "checkpoint")


def test_a_file_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    copies = a_copy(tmp_path)
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="Error: "):
        behind.write(copies, GENERATION, 0, tmp_path / "checkpoint")
    assert not (copies.folder / BESIDE).exists()
