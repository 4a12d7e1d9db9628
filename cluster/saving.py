"""When a run is saved, and what becomes of a save that fails.

What the learner has learned is never dropped while the learner lives: a save that fails (a full
disk) is tried again after later steps and, at the end, for ten minutes; before an error
ends a run, what is done is saved. What would be saved is the state after the last step that the
learner has done; an update that was left out, because its gradient was not finite, has not changed
it. The ranks refuse to save weights that are not finite.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path

from cohort.cluster.continuing import Best, SavedState
from cohort.cluster.evaluation import Evaluation
from cohort.cluster.observe.metrics import StepTimes
from cohort.cluster.run import Run
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
    """Save every `run.checkpoint_every` steps. A failed save is said, and tried again later.

    So is a step whose evaluation is the best so far, and its checkpoint is kept. The last step is
    left to `save_at_the_end`. Raises LearnerError when the learner is lost.
    """
    before = run.saves.best
    better = evaluation is not None and _is_better(before, evaluation)
    if evaluation is not None and better:
        run.saves.best = {"step": run.progress.step, "score": evaluation.score}
    if run.progress.step >= run.config.run.steps:
        return
    every = run.config.run.checkpoint_every
    due = better or (bool(every) and run.progress.step % every == 0)
    if run.saves.failed_at is not None:
        due = due or time.monotonic() - run.saves.failed_at >= RETRY_S
    if not due:
        return
    error = await _try_to_save(run)
    if error is not None:
        run.saves.best = before
        run.console.note(
            f"checkpoint {run.progress.step} could not be written, training goes on and tries "
            f"again later: {error}"
        )


async def save_at_the_end(run: Run) -> None:
    """Save what is not saved yet; try until it is there, or PATIENCE_S have passed.

    Raises CheckpointError when it could not be saved, LearnerError when the learner is lost.
    """
    if run.saves.step == run.progress.step:
        return
    began, wait, tries = time.monotonic(), FIRST_WAIT_S, 1
    while error := await _try_to_save(run):
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


async def save(run: Run) -> None:
    """Write a complete checkpoint: weights, optimizer, and where the run stands.

    Raises CheckpointError, OSError or LearnerError when it could not be written.
    """
    skipped = run.learner.nonfinite_in_a_row
    run.console.note(
        f"saving checkpoint {run.progress.step}"
        + (" (the last update was not finite, and changed nothing)" if skipped else "")
    )
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
    folder = run.saves.checkpoints.begin(run.progress.step)
    await run.learner.save(folder, after_skipped=True)
    _require_step(folder, run.learner.version)
    # Writing to disk can take long; rewards and retries of an overlapped run must not wait for it.
    await asyncio.to_thread(run.saves.checkpoints.commit, run.progress.step, state)
    run.saves.step, run.saves.failed_at = run.progress.step, None
    if run.saves.best is not None and run.saves.best["step"] == run.progress.step:
        await asyncio.to_thread(run.saves.checkpoints.mark_best, run.progress.step)
    await run.journal.trim(run.saves.checkpoints.steps())


def _is_better(best: Best | None, evaluation: Evaluation) -> bool:
    """NaN, where no reward applies, is no score."""
    return evaluation.score > (best["score"] if best is not None else -math.inf)


async def _try_to_save(run: Run) -> Exception | None:
    """None when it was saved, or why not when it may be tried again."""
    try:
        await save(run)
    except Exception as error:
        run.saves.checkpoints.discard(run.progress.step)
        if isinstance(error, LearnerError) and not error.savable:
            raise
        run.saves.failed_at = time.monotonic()
        return error
    return None


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
