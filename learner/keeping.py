"""A copy of a rank's state after every step, and starting again from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cohort.learner.copies import Copies, MemoryWriter
from cohort.learner.saving import read_engine, write_engine
from cohort.learner.state import Engine, RankState


def keep(state: RankState, copies: Copies, generation: int, first_on_machine: bool) -> None:
    """Copy this rank's state; all ranks copy together, after a step.

    Random numbers are no part of it: neither the policy nor the optimizer draws any.

    Args:
        state: This rank's.
        copies: Where they lie.
        generation: One more than that of the copy before, which stays.
        first_on_machine: This rank also writes what all ranks hold alike.

    Raises:
        CheckpointError: On every rank, when any could not write. The copy before stays.
    """
    target = copies.place(generation)
    before = state.engine.save_non_zero_checkpoint
    # Under ZeRO-3 every rank has a part of the weights, and DeepSpeed lets each write it.
    if state.spec.learner.zero_stage < 3:
        state.engine.save_non_zero_checkpoint = first_on_machine
    try:
        with copies.writing(generation) as writer:
            with _through(state.engine, writer):
                writing = write_engine(state, target.parent, target.name)
            if state.reference is not None and state.reference.refreshed:
                with writing.kept():
                    state.reference.save(target, write=first_on_machine)
            writing.agree(state.device)
    finally:
        state.engine.save_non_zero_checkpoint = before


def restore(state: RankState, copies: Copies, generation: int) -> int:
    """Take the state of a copy; returns the optimizer steps done.

    Raises:
        CheckpointError: This machine has no whole copy of that number.
    """
    copies.require(generation)
    source = copies.place(generation)
    if state.reference is not None:
        state.reference.load(source)
    with _through(state.engine, MemoryWriter({})):
        return read_engine(state, source.parent, source.name)


@contextmanager
def _through(engine: Engine, writer: MemoryWriter) -> Iterator[None]:
    """A block in which DeepSpeed writes and reads through `writer`."""
    wrapped = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    try:
        yield
    finally:
        engine.checkpoint_engine = wrapped
