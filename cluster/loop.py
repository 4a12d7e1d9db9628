"""THE training loop. Read it from top to bottom; everything else is a detail of one of its lines.

Prompts -> groups of completions -> rewards -> one optimizer step -> new weights -> prompts.

Synchronous training is `actors.max_staleness = 0`: nothing is generated before the weights it is
generated with exist. With a larger value the next steps' prompts are admitted before the learner
has caught up, and generation overlaps with training; nothing else changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from cohort.actors.errors import CohortError
from cohort.actors.pool import Probe
from cohort.cluster.config import Config
from cohort.cluster.observe.metrics import StepTimes, reward_errors
from cohort.cluster.recording import Finished, Run, record
from cohort.cluster.saving import rescue, save_at_the_end, save_if_due
from cohort.cluster.stream import MAX_GENERATIONS, Batch
from cohort.learner.learner import LostGroups, StepResult

T = TypeVar("T")


class TrainingError(CohortError):
    """The run cannot go on; the message says why and which key to change."""


class ProgramError(Exception):
    """Code that the run calls is wrong; the message is its traceback."""


async def train(run: Run) -> None:
    """Train until `run.steps` steps are done, or until `run.stop` is set; then save.

    Raises TrainingError, RolloutError, LearnerError or CheckpointError when the run cannot go on;
    what the learner has learned until then is saved first, if it still can.
    """
    try:
        await _steps(run)
    except BaseException as error:
        await rescue(run, error)
        raise
    finally:
        run.stream.cancel()
    await save_at_the_end(run)


async def _steps(run: Run) -> None:
    config = run.config
    # Engines start from the weights on disk; after a resume those are not the run's.
    await publish(run)
    while run.step < config.run.steps and not run.stop.is_set():
        began = time.monotonic()

        # 1. Let actors work on this step, and on as many later ones as staleness allows.
        last = min(run.step + config.actors.max_staleness, config.run.steps - 1)
        await run.stream.admit(last)

        # 2. Wait for this step's groups, generated and scored.
        batch = await unless_stopped(run, run.stream.take(run.step))
        if batch is None:
            break
        check_failures(config, batch)

        # 3. One optimizer step on them. From here on it counts, whatever comes next.
        train_began = time.monotonic()
        batch, result = await learn(run, batch)
        train_s = time.monotonic() - train_began
        run.finish(Finished(batch, result, train_s))

        # 4. The actors pull the new weights.
        sync_began = time.monotonic()
        gap = await publish(run)
        sync_s = time.monotonic() - sync_began

        # 5. Write down what happened.
        times = StepTimes(
            step=time.monotonic() - began,
            generate=batch.generate_s,
            reward=batch.reward_s,
            train=train_s,
            sync=sync_s,
        )
        await record(run, times, gap)

        # 6. Save now and then; what is saved is what `run.resume` continues from.
        await save_if_due(run)


async def learn(run: Run, batch: Batch) -> tuple[Batch, StepResult]:
    """One optimizer step. Groups that were lost since they were scored are generated again."""
    for _ in range(MAX_GENERATIONS - 1):
        try:
            return batch, await run.learner.step(batch.groups)
        except LostGroups as lost:
            run.console.note(f"step {batch.step}: {lost}; they are generated again")
            batch = await run.stream.again(batch, lost.group_ids)
            check_failures(run.config, batch)
    return batch, await run.learner.step(batch.groups)


async def publish(run: Run) -> float:
    """Publish the learner's weights and have every actor load and prove them; the probe's gap."""
    info = await run.learner.publish(remote=run.several_nodes)
    # Not while the engines load: on shared cores both would wait for each other.
    logprobs = await run.learner.logprobs(run.probe_ids)
    probe = Probe(run.probe_ids, logprobs, run.probe_tolerance, run.probe_floor)
    return await run.pool.sync(info, probe)


async def unless_stopped(run: Run, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the run is asked to stop first."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(run.stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        stopping.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task, stopping})


def check_failures(config: Config, batch: Batch) -> None:
    """Stop when too much of a step was lost or could not be scored, or none of it is there.

    Raises TrainingError, or ProgramError for a mistake in a program.
    """
    for failure in batch.failures:
        if failure.kind == "bug":
            raise ProgramError(f"step {batch.step}: {failure}")
    if not batch.groups:
        first = batch.failures[0]
        raise TrainingError(
            f"step {batch.step}: none of the {len(batch.failures)} groups was generated and "
            f"scored. {first}"
        )
    share, example = reward_errors(batch)
    if share > config.rewards.max_error_rate:
        raise TrainingError(
            f"step {batch.step}: {100 * share:.3g}% of the completions were lost or could not be "
            f"scored, more than rewards.max_error_rate={config.rewards.max_error_rate:g} allows. "
            f"The first: {example}"
        )
