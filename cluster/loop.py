"""THE training loop. Read it from top to bottom; everything else is a detail of one of its lines.

Prompts -> groups of completions -> rewards -> one optimizer step -> new weights -> prompts.

Synchronous training is `actors.max_staleness = 0`: nothing is generated before the weights it is
generated with exist. With a larger value the next steps' prompts are admitted before the learner
has caught up, and generation overlaps with training; nothing else changes.
"""

from __future__ import annotations

from cohort.cluster.failures import check_failures
from cohort.cluster.run import Finished, Run, StepTimer
from cohort.cluster.saving import rescue, save_at_the_end, save_if_due
from cohort.cluster.signals import unless_stopped
from cohort.cluster.stream import MAX_GENERATIONS, Batch
from cohort.learner.learner import LostGroups, StepResult


async def train(run: Run) -> None:
    """Train until `run.steps` steps are done, or until `run.stop` is set; then save.

    What the learner has learned is saved first when an error ends the run, if it still can be.

    Raises:
        CohortError: the run cannot go on (TrainingError, RolloutError, LearnerError), or what it
            learned could not be saved (CheckpointError).
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
    config, progress = run.config, run.progress
    # Engines start from the weights on disk; after a resume those are not the run's.
    await run.publisher.publish()
    while progress.step < config.run.steps and not run.stop.is_set():
        timer = StepTimer()

        # 1. Let actors work on this step, and on as many later ones as staleness allows.
        last = min(progress.step + config.actors.max_staleness, config.run.steps - 1)
        await run.stream.admit(last)

        # 2. Wait for this step's groups, generated and scored.
        batch = await unless_stopped(run.stop, run.stream.take(progress.step))
        if batch is None:
            break
        check_failures(config, batch)

        # 3. One optimizer step on them. From here on it counts, whatever comes next.
        with timer("train"):
            batch, result = await learn(run, batch)
        run.finish(Finished(batch, result, timer.seconds["train"]))

        # 4. The actors pull the new weights.
        with timer("sync"):
            gap = await run.publisher.publish()

        # 5. Write down what happened.
        await run.record(timer.times(batch), gap)

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
