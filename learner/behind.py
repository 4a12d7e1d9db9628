"""Writing a checkpoint behind the ranks' backs: from a copy of their state, while they train on.

A copy holds what DeepSpeed writes. What else a checkpoint has (the Hugging Face folder, the counts)
the ranks leave beside it, in shared memory, before they go on: the smaller part, and it is written
by the same lines as in the foreground.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from cohort.learner.checkpoint import CheckpointError, sizes_in
from cohort.learner.copies import INDEX, Copies, look_at
from cohort.learner.saving import (
    DEEPSPEED_FOLDER,
    DEEPSPEED_TAG,
    Writing,
    require_finite,
    write_rest,
)
from cohort.learner.state import RankState

BESIDE = "beside"
# What must be there, and how long: the copies have digests, these files have not.
LISTING = "beside.json"
# DeepSpeed's file of what all ranks hold alike. On every machine one rank copies it; in a
# checkpoint it is rank 0's.
HELD_ALIKE = "mp_rank_"


def prepare(state: RankState, copies: Copies) -> None:
    """Leave beside the copies what a checkpoint has and they do not; all ranks together.

    Args:
        state: This rank's, as it was when it was copied last.
        copies: Where the copies lie.

    Raises:
        CheckpointError: On every rank, when rank 0 could not write or the weights are not finite.
    """
    require_finite(state.model, state.device)
    target, writing = copies.folder / BESIDE, Writing()
    if state.spec.rank == 0:
        with writing.kept():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
    write_rest(state, target, writing)
    if state.spec.rank == 0:
        with writing.kept():
            (copies.folder / LISTING).write_text(json.dumps(sizes_in(target)), encoding="utf-8")
    try:
        writing.agree(state.device)
    except CheckpointError:
        # The memory is needed for other things.
        if state.spec.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        raise


def write(copies: Copies, generation: int, rank: int, target: Path) -> None:
    """Write a rank's part of a checkpoint from its copy, which nobody changes meanwhile.

    Args:
        copies: Of the rank.
        generation: Of the copy.
        rank: Whose part; that of rank 0 has what was left beside the copy.
        target: The checkpoint's folder.

    Raises:
        CheckpointError: The copy is not there, or damaged, or the files cannot be written.
    """
    try:
        _write(copies, generation, rank, target)
    except CheckpointError:
        raise
    except Exception as error:
        # Each library has its own for a full disk.
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    finally:
        if rank == 0:
            shutil.rmtree(copies.folder / BESIDE, ignore_errors=True)


def _write(copies: Copies, generation: int, rank: int, target: Path) -> None:
    names, place = copies.require(generation), copies.place(generation)
    folder = target / DEEPSPEED_FOLDER
    (folder / DEEPSPEED_TAG).mkdir(parents=True, exist_ok=True)
    for name in names:
        if not name.endswith(INDEX) and (rank == 0 or not name.startswith(HELD_ALIKE)):
            torch.save(look_at(place / name), folder / DEEPSPEED_TAG / name)
    if rank == 0:
        # DeepSpeed's programs for people who read its files without us.
        for script in copies.folder.glob("*.py"):
            shutil.copy(script, folder)
        shutil.copytree(copies.folder / BESIDE, target, dirs_exist_ok=True)
        there = sizes_in(target)
        listed = json.loads((copies.folder / LISTING).read_text(encoding="utf-8"))
        if any(there.get(name) != size for name, size in listed.items()):
            raise CheckpointError(f"what was left in {copies.folder / BESIDE} is not whole")
