"""THE training loop. Read it from top to bottom; everything else is a detail of one of its lines.

Prompts -> groups of completions -> rewards -> one optimizer step -> new weights -> prompts.

Synchronous training is `actors.max_staleness = 0`: nothing is generated before the weights it is
generated with exist. With a larger value the next steps' prompts are admitted before the learner
has caught up, and generation overlaps with training; nothing else changes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from actors.pool import Probe, RolloutPool
from actors.records import Failure
from cluster.config import Config
from cluster.console import Console
from cluster.metrics import Counters, StepTimes, reward_errors, step_metrics
from cluster.scribe import Scribe
from cluster.stream import Batch, GroupStream
from cluster.tracking import Tracker
from learner.checkpoint import Checkpoints
from learner.group import LearnerGroup


class TrainingError(Exception):
    """The run cannot go on; the message says why and which key to change."""


@dataclass
class Run:
    """Everything that a run consists of, started and ready."""

    config: Config
    pool: RolloutPool
    learner: LearnerGroup
    stream: GroupStream
    tracker: Tracker
    scribe: Scribe
    console: Console
    checkpoints: Checkpoints
    several_nodes: bool
    probe_ids: list[int]
    probe_tolerance: float
    stop: asyncio.Event
    step: int
    counters: Counters
    probe_floor: float | None = None


async def train(run: Run) -> None:
    """Train until `run.steps` steps are done, or until `run.stop` is set; then save.

    Raises TrainingError, RolloutError or LearnerError when the run cannot go on.
    """
    config = run.config
    saved = run.step
    # Engines start from the weights on disk; after a resume those are not the run's.
    await publish(run)
    cursor = run.stream.cursor
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

        # 3. One optimizer step on them.
        train_began = time.monotonic()
        result = await run.learner.step(batch.groups)
        train_s = time.monotonic() - train_began

        # 4. The actors pull the new weights.
        sync_began = time.monotonic()
        gap = await publish(run)
        sync_s = time.monotonic() - sync_began

        # 5. Write down what happened.
        await run.scribe.write(batch.step, [group.ref for group in batch.groups])
        run.counters.add(batch, result)
        run.counters.check(run.stream.admitted, run.stream.in_flight)
        times = StepTimes(
            step=time.monotonic() - began,
            generate=batch.generate_s,
            reward=batch.reward_s,
            train=train_s,
            sync=sync_s,
        )
        metrics = step_metrics(
            batch, result, times, run.counters, run.learner.version, gap, run.pool.restarts
        )
        run.tracker.log(metrics)
        run.console.step(metrics)
        run.step, cursor = run.step + 1, batch.cursor

        # 6. Save now and then; what is saved is what `run.resume` continues from.
        every = config.run.checkpoint_every
        if run.step == config.run.steps or (every and run.step % every == 0):
            await save(run, cursor)
            saved = run.step
    run.stream.cancel()
    if saved != run.step:
        await save(run, cursor)


async def publish(run: Run) -> float:
    """Publish the learner's weights and have every actor load and prove them; the probe's gap."""
    info = await run.learner.publish(remote=run.several_nodes)
    # Not while the engines load: on shared cores both would wait for each other.
    logprobs = await run.learner.logprobs(run.probe_ids)
    probe = Probe(run.probe_ids, logprobs, run.probe_tolerance, run.probe_floor)
    return await run.pool.sync(info, probe)


async def save(run: Run, cursor: int) -> None:
    """Write a complete checkpoint: weights, optimizer, and where the run stands.

    Not after a step whose gradient was not finite: what led to it may be in the weights already.
    """
    if run.learner.nonfinite_in_a_row:
        run.console.note(f"no checkpoint {run.step}: the last step was not finite")
        return
    state: dict[str, Any] = {
        "step": run.step,
        "cursor": cursor,
        "counters": run.counters.as_dict(),
        "tracking": run.tracker.state(),
        "pass_rates": run.stream.history.as_dict() if run.stream.history else None,
    }
    run.console.note(f"saving checkpoint {run.step}")
    await run.learner.save(run.checkpoints.begin(run.step))
    # Writing to disk can take long; rewards and retries of an overlapped run must not wait for it.
    await asyncio.to_thread(run.checkpoints.commit, run.step, state)


async def unless_stopped(run: Run, work: Any) -> Any:
    """The result of `work`, or None when the run is asked to stop first."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(run.stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


def check_failures(config: Config, batch: Batch) -> None:
    """Stop when too many rewards failed, or nothing was generated at all."""
    share, example = reward_errors(batch)
    if share > config.rewards.max_error_rate:
        raise TrainingError(
            f"step {batch.step}: {share:.0%} of the scores failed, more than "
            f"rewards.max_error_rate={config.rewards.max_error_rate:g} allows. The first: {example}"
        )
    if not batch.groups:
        first: Failure = batch.failures[0]
        raise TrainingError(
            f"step {batch.step}: none of the {len(batch.failures)} groups was generated. "
            f"{first.what}: {first.message}"
        )
