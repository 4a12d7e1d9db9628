"""THE training loop. Read it from top to bottom; everything else is a detail of one of its lines.

Prompts -> groups of completions -> rewards -> one optimizer step -> new weights -> prompts.

Synchronous training is `actors.max_staleness = 0`: nothing is generated before the weights it is
generated with exist. With a larger value the next steps' prompts are admitted before the learner
has caught up, and generation overlaps with training; nothing else changes.
"""

from __future__ import annotations

from cohort.actors.admission import last_step
from cohort.actors.errors import CohortError
from cohort.cluster.evaluation import Evaluation
from cohort.cluster.failures import check_failures
from cohort.cluster.run import Finished, Run, StepTimer
from cohort.cluster.saving import rescue, save_at_the_end, save_if_due
from cohort.cluster.signals import unless_stopped
from cohort.cluster.sizing import Sizing
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
        await run.journal.settle()
    await save_at_the_end(run)


async def _steps(run: Run) -> None:
    config, progress, sizing = run.config, run.progress, Sizing(run.config)
    # Engines start from the weights on disk; after a resume those are not the run's.
    await run.publisher.publish()
    while progress.step < config.run.steps and not run.stop.is_set():
        timer = StepTimer()

        # 1. Let actors work on this step, and on as many later ones as staleness allows.
        last = last_step(progress.step, config.actors.max_staleness)
        skipped = progress.step - run.learner.version
        await run.stream.admit(min(last, config.run.steps - 1), skipped)

        # 2. Wait for this step's groups, generated and scored.
        with timer("take"):
            batch = await unless_stopped(run.stop, run.stream.take(progress.step))
        if batch is None:
            break
        check_failures(config, batch)
        run.actors.pool.check()

        # 3. One optimizer step on them, once the journal has them on the disk. From here on it
        #    counts, whatever comes next.
        with timer("train"):
            batch, result = await learn(run, batch)
        run.finish(Finished(batch, result, timer.seconds["train"]))

        # 4. The actors pull the new weights.
        with timer("sync"):
            published = await run.publisher.publish()

        # 5. Write down what happened, with a score on held-out prompts now and then.
        times = timer.times(batch)
        await run.journal.after(batch.step, published.version, published.fingerprint)
        evaluation = await evaluate_if_due(run)
        await run.record(times, published.gap, evaluation)

        # 6. Save now and then; what is saved is what `run.resume` continues from. Then the run may
        #    become larger or smaller.
        await save_if_due(run, evaluation)
        await sizing.adjust(run, times.step, timer.seconds["take"])


async def evaluate_if_due(run: Run) -> Evaluation | None:
    """Every `run.evaluate_every` steps, score the weights that the engines have just pulled.

    An evaluation that fails is reported, and training goes on.
    """
    every, step = run.config.run.evaluate_every, run.progress.step
    if run.held_out is None or step % every:
        return None
    scoring = run.held_out.score(run.actors.pool, run.actors.rewards, name=f"{step}:")
    try:
        found = await unless_stopped(run.stop, scoring)
    except CohortError as error:
        run.console.note(f"the evaluation after step {step} failed, training goes on: {error}")
        return None
    if found is not None:
        run.console.note(
            f"held-out after step {step}: greedy {found.greedy_reward:.3f} "
            f"({found.greedy_solved:.1%} solved), sampled {found.sampled_reward:.3f}"
        )
    return found


async def learn(run: Run, batch: Batch) -> tuple[Batch, StepResult]:
    """One optimizer step. Groups that were lost since they were scored come from the journal, or
    are generated again."""
    for _ in range(MAX_GENERATIONS - 1):
        try:
            await run.journal.before(batch)
            return batch, await run.learner.step(batch.groups)
        except LostGroups as lost:
            run.console.note(f"step {batch.step}: {lost}; they are generated again")
            batch = await run.stream.again(batch, lost.group_ids)
            check_failures(run.config, batch)
    await run.journal.before(batch)
    return batch, await run.learner.step(batch.groups)
