"""When a run is saved, and what becomes of a save that fails.

What the learner has learned is never dropped while the learner lives: a save that fails (a full
disk) is tried again after later steps and, at the end, for ten minutes; before an error
ends a run, what is done is saved. What would be saved is the state after the last step that the
learner has done; an update that was left out, because its gradient was not finite, has not changed
it. The ranks refuse to save weights that are not finite.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import time
from pathlib import Path

from cohort.cluster.continuing import Best, SavedState
from cohort.cluster.evaluation import Evaluation
from cohort.cluster.observe.metrics import StepTimes
from cohort.cluster.run import Run, Writing
from cohort.learner.checkpoint import LEARNER_FILE, CheckpointError
from cohort.learner.learner import LearnerError

# After a save that failed, the next try comes with a later step, but not at once.
RETRY_S = 60.0
# How long the end of a run waits for room on the disk, say.
PATIENCE_S = 600.0
TRIES = 3
# Waits between the tries at the end: so long at first, doubled each time up to the second.
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0


async def save_if_due(run: Run, evaluation: Evaluation | None = None) -> None:
    """Save every `run.checkpoint_every` steps. A failed save is reported, and tried again later.

    So is a step whose evaluation is the best so far, and its checkpoint is kept. The last step is
    left to `save_at_the_end`. The files are written while training goes on, where the ranks keep a
    copy of their state; one checkpoint at a time. Raises LearnerError when the learner is lost.
    """
    saves, config, step = run.saves, run.config.run, run.progress.step
    if saves.writing is not None and saves.writing.task.done():
        await _settle_and_tell(run)
    due = bool(config.checkpoint_every) and step % config.checkpoint_every == 0
    if saves.failed_at is not None:
        due = due or time.monotonic() - saves.failed_at >= RETRY_S
    if due or step >= config.steps or _is_better(saves.best, evaluation):
        # Before the comparison with the best: its checkpoint may turn out not to be there.
        await _settle_and_tell(run)
    before = saves.best
    if evaluation is not None and _is_better(before, evaluation):
        saves.best, due = {"step": step, "score": evaluation.score}, True
    if due and step < config.steps:
        # What has failed behind the learner is tried in the other way.
        error = await _try_to_save(run, before, behind=saves.failed_at is None)
        if error is not None:
            _tell_failed(run, step, error)


async def save_at_the_end(run: Run) -> None:
    """Save what is not saved yet; try until it is there, or PATIENCE_S have passed.

    Raises CheckpointError when it could not be saved, LearnerError when the learner is lost.
    """
    await _settle_and_tell(run)
    if run.saves.step == run.progress.step:
        return
    began, wait, tries = time.monotonic(), FIRST_WAIT_S, 1
    while error := await _try_to_save(run, run.saves.best):
        left = PATIENCE_S - (time.monotonic() - began)
        # Room comes back, a mistake in a program does not.
        may_pass = isinstance(error, (CheckpointError, LearnerError, OSError))
        if left <= 0 or (not may_pass and tries >= TRIES):
            raise CheckpointError(
                f"step {run.progress.step} could not be saved in {time.monotonic() - began:.0f} s: "
                f"{error}\n{_newest(run)}"
            ) from error
        wait = min(wait, max(left, 0.1))
        run.console.note(
            f"checkpoint {run.progress.step} could not be written: {error}\nThe learner keeps it: "
            f"trying again in {wait:.0f} s, for {left:.0f} s more"
        )
        await asyncio.sleep(wait)
        wait, tries = min(2 * wait, LONGEST_WAIT_S), tries + 1


async def rescue(run: Run, error: BaseException) -> None:
    """Before an error ends a run: record and save what the learner has done. Raises nothing."""
    try:
        if not run.lost:
            await _record_late(run)
            # Its files come from copies that outlive the ranks.
            await _settle_and_tell(run)
        if run.saves.step == run.progress.step:
            return
        if run.lost or (isinstance(error, LearnerError) and not error.savable):
            run.console.note(f"the learner is lost: {_newest(run)}")
            return
        run.console.note(f"the run ends with an error after step {run.progress.step}: saving first")
        await save_at_the_end(run)
        run.console.note(
            f"saved; the same command with run.resume=true goes on after step {run.progress.step}"
        )
    except Exception as second:  # noqa: BLE001 - the first error is the one to be shown
        run.console.note(f"step {run.progress.step} could not be saved: {second}\n{_newest(run)}")


async def _record_late(run: Run) -> None:
    """Write down a step after which the run failed, before its times and its gap were known."""
    if (finished := run.progress.unrecorded) is not None:
        await run.record(StepTimes.of(finished.batch, finished.train_s), math.nan)


async def begin(run: Run, before: Best | None, behind: bool = False) -> Writing:
    """Begin a complete checkpoint: weights, optimizer, and where the run stands.

    Args:
        run: After a step.
        before: The best evaluation without this step's.
        behind: Have the ranks' files written from a copy while training goes on, where there is
            one; otherwise they are there when this returns.

    Raises:
        CheckpointError, OSError or LearnerError when it could not be begun.
    """
    step, version, skipped = run.progress.step, run.learner.version, run.learner.nonfinite_in_a_row
    run.console.note(
        f"saving checkpoint {step}"
        + (" (the last update was not finite, and changed nothing)" if skipped else "")
    )
    state = _state_of(run)
    # What follows is in parts of the journal of its own: those before can go with this checkpoint.
    await run.journal.rotate()
    folder = run.saves.checkpoints.begin(step)
    written = await run.learner.save_behind(folder) if behind else None
    if written is None:
        await run.learner.save(folder, after_skipped=True)

    async def finish() -> Exception | None:
        try:
            if written is not None:
                await written
            _require_step(folder, version)
            await _commit(run, step, state)
        except Exception as error:  # noqa: BLE001 - told by who notes the end
            return error
        return None

    return Writing(step, asyncio.create_task(finish()), before)


async def _commit(run: Run, step: int, state: SavedState) -> None:
    """Make what is written for a step its checkpoint."""
    saves = run.saves
    # Writing to disk can take long; rewards and retries of an overlapped run must not wait for it.
    await asyncio.to_thread(saves.checkpoints.commit, step, state)
    saves.step, saves.failed_at = step, None
    best = state.get("best")
    if best is not None and best["step"] == step:
        await asyncio.to_thread(saves.checkpoints.mark_best, step)
    await run.journal.trim(saves.checkpoints.steps())


def _state_of(run: Run) -> SavedState:
    """Where the run stands; nothing in it changes with the run."""
    history = run.stream.history
    state: SavedState = {
        "step": run.progress.step,
        "cursor": run.progress.cursor,
        "counters": run.progress.counters.as_dict(),
        "tracking": run.recorder.tracker.state(),
        "pass_rates": history.as_dict(before=run.progress.step) if history else None,
        "fingerprint": run.saves.fingerprint,
        "ahead": {
            "steps": [[step, *drawn] for step, drawn in run.progress.ahead.steps.items()],
            "cursor": run.progress.ahead.cursor,
        },
    }
    if run.saves.best is not None:
        state["best"] = run.saves.best
    return copy.deepcopy(state)


def _is_better(best: Best | None, evaluation: Evaluation | None) -> bool:
    """NaN, where no reward applies, is no score."""
    if evaluation is None:
        return False
    return evaluation.score > (best["score"] if best is not None else -math.inf)


async def _try_to_save(run: Run, before: Best | None, behind: bool = False) -> Exception | None:
    """None when it was saved, or is being saved; or why not when it may be tried again."""
    try:
        run.saves.writing = await begin(run, before, behind)
    except Exception as error:
        if isinstance(error, LearnerError) and not error.savable:
            run.saves.checkpoints.discard(run.progress.step)
            raise
        return _failed(run, run.progress.step, before, error)
    return None if behind else await _settle(run)


async def _settle(run: Run) -> Exception | None:
    """Wait for what is being written, and note its end. Returns why it is not there, if so."""
    writing = run.saves.writing
    if writing is None:
        return None
    # Where the run is ended meanwhile, what is being written goes on.
    await asyncio.wait({writing.task})
    run.saves.writing = None
    error = writing.task.result()
    return None if error is None else _failed(run, writing.step, writing.before, error)


async def _settle_and_tell(run: Run) -> None:
    """Wait for what is being written behind the learner, and say it."""
    writing = run.saves.writing
    if writing is None:
        return
    if not writing.task.done():
        run.console.note(f"waiting for checkpoint {writing.step} to be written")
    error = await _settle(run)
    if error is not None:
        _tell_failed(run, writing.step, error)


def _failed(run: Run, step: int, before: Best | None, error: Exception) -> Exception:
    """Forget a checkpoint that could not be written."""
    saves = run.saves
    saves.checkpoints.discard(step)
    if saves.best is not None and saves.best["step"] == step:
        saves.best = before
    saves.failed_at = time.monotonic()
    return error


def _tell_failed(run: Run, step: int, error: Exception) -> None:
    run.console.note(
        f"checkpoint {step} could not be written, training goes on and tries again later: {error}"
    )


def _require_step(folder: Path, version: int) -> None:
    """Raise CheckpointError unless the ranks saved the step that the driver knows of."""
    saved = json.loads((folder / LEARNER_FILE).read_text(encoding="utf-8"))["steps_done"]
    if saved != version:
        raise CheckpointError(
            f"the learner saved {saved} optimizer steps, and {version} are accounted for"
        )


def _newest(run: Run) -> str:
    newest = run.saves.checkpoints.latest()
    if newest is None:
        return "there is no complete checkpoint"
    return f"the newest complete checkpoint is {newest}; run.resume=true goes on from it"
