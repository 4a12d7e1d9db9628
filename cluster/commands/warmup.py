"""`cohort warmup`: cross-entropy on a task's demonstrations, before reinforcement learning.

Learner, packing, precision and optimizer are those of `cohort train`; there is no engine and no
reward. It writes a Hugging Face folder, which `model.path` of a training run can name.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cohort.actors.records import ScoredGroup, ScoredRef
from cohort.cluster.commands.demonstrations import (
    Shown,
    as_group,
    demonstration,
    demonstrations,
    scored_tokens,
)
from cohort.cluster.config import SECTIONS, Config, ConfigError, compact
from cohort.cluster.config_file import parse_overrides
from cohort.cluster.launch import Services, launch
from cohort.cluster.observe.console import Console, duration
from cohort.cluster.prepare import Prepared, passing_logs, prepare
from cohort.cluster.ray_start import check_start
from cohort.cluster.signals import Signals, Stopped
from cohort.learner.checkpoint import new_folder, require_free
from cohort.learner.config import AlgorithmConfig
from cohort.learner.learner import Learner, StepResult

# Held-out demonstrations whose loss is measured before and after.
HELD_OUT = 32
# Config keys of training -> the flag that replaces them here.
FLAGS = {
    "run.steps": "--steps",
    "task.prompts_per_step": "--batch-size",
    "learner.learning_rate": "--learning-rate",
}


@dataclass(frozen=True)
class WarmUp:
    """The flags of a warm-up.

    Attributes:
        steps: Optimizer steps.
        batch_size: Demonstrations of a step.
        learning_rate: The peak; schedule and optimizer are those of the config's learner.
        examples: Training rows that demonstrations are taken from; 0: all.
    """

    steps: int
    batch_size: int
    learning_rate: float
    examples: int = 0


def check_overrides(overrides: list[str]) -> None:
    """Raise ConfigError for a key that a flag of this command replaces."""
    given = parse_overrides(overrides)
    inside = [
        f"{name}.{key}"
        for name, section in given.items()
        if name in SECTIONS and isinstance(section, dict)
        for key in section
    ]
    for key in [*given, *inside]:
        if key in FLAGS:
            raise ConfigError(f"{key} is for training: use {FLAGS[key]} for the warm-up")
        if key.startswith("algorithm."):
            raise ConfigError(f"{key} is for training: the warm-up is plain cross-entropy")


def warmup_config(config: Config, given: WarmUp) -> Config:
    """The config of the learner: cross-entropy at temperature 1, with the warm-up's flags.

    Raises:
        ConfigError: The learning rate is invalid.
    """
    if not 0 < given.learning_rate < math.inf:
        raise ConfigError(f"--learning-rate must be above 0, got {given.learning_rate:g}")
    learner = config.learner.model_copy(update={"learning_rate": given.learning_rate})
    return config.model_copy(
        update={
            "algorithm": AlgorithmConfig(objective="cross_entropy"),
            "learner": learner,
            "run": config.run.model_copy(update={"steps": given.steps}),
            "actors": config.actors.model_copy(update={"temperature": 1.0}),
        }
    )


async def run_warmup(config: Config, given: WarmUp, out: Path) -> int:
    """Check, start the learner, train, write `out`. Returns the exit code: 0, or 130/143 when
    stopped, and then nothing was written.

    Raises CohortError when it cannot start or go on.
    """
    require_free(out)
    config = warmup_config(config, given)
    prepared = prepare(config)
    config = prepared.config
    batches = demonstrations(prepared, given.examples)
    first = list(islice(batches, given.batch_size))  # what is wrong with a task shows here
    check_start(config, prepared.parameters, prepared.trained)
    with (
        Signals() as signals,
        passing_logs("warmup") as log_dir,
        Console(given.steps, "plain") as console,
    ):
        console.note(f"cohort warmup: {out}\n{compact(config)}")
        try:
            return await signals.cancel(
                _warm_up(prepared, given, first, batches, out, log_dir, console, signals)
            )
        except Stopped as stopped:
            console.note(f"{stopped}: stopped before training; nothing was written")
            return stopped.exit_code


async def _warm_up(
    prepared: Prepared,
    given: WarmUp,
    first: list[Shown],
    later: Iterator[Shown],
    out: Path,
    log_dir: Path,
    console: Console,
    signals: Signals,
) -> int:
    async with launch(prepared, console, log_dir, ("learner",), signals=signals) as actors:
        learner = actors.learner
        stop = asyncio.Event()

        def leave() -> None:
            console.note(
                f"{signals.name()}: stopping after this step; a second signal stops at once"
            )
            stop.set()

        signals.then(leave)
        held_out = await _groups(actors, prepared, _held_out(prepared))
        before = await held_out_loss(learner, held_out)
        console.note(f"held-out loss {before:.4f} on {len(held_out)} demonstrations")
        batch, began = await _groups(actors, prepared, first), time.monotonic()
        for step in range(given.steps):
            step_began = time.monotonic()
            result = await learner.step(batch)
            if step + 1 < given.steps:
                batch = await _groups(actors, prepared, list(islice(later, given.batch_size)))
            now = time.monotonic()
            eta = (now - began) / (step + 1) * (given.steps - step - 1)
            console.note(step_line(step + 1, given.steps, result, now - step_began, eta))
            if stop.is_set():
                console.note(f"stopped after step {step + 1} of {given.steps}; nothing was written")
                return 128 + (signals.caught or 0)
        after = await held_out_loss(learner, held_out)
        console.note(f"held-out loss {before:.4f} -> {after:.4f}")
        with new_folder(out) as folder:
            await learner.export(folder)
        peak = sum(rank["peak_rss_bytes"] for rank in await learner.memory())
        console.note(f"peak memory: learner {peak / 2**30:.1f} GiB")
        console.note(f"model written to {out}; train from it with model.path={out}")
        return 0


def step_line(step: int, steps: int, result: StepResult, seconds: float, eta_s: float) -> str:
    """One step on one line. tokens/s: of prompts and demonstrations together."""
    width = len(str(steps))
    skipped = "" if result.applied else "  not finite: left out"
    return (
        f"step {step:>{width}}/{steps}  loss {result.loss:.4f}  grad {result.grad_norm:.2f}"
        f"  lr {result.learning_rate:.1e}  {seconds:.1f} s"
        f"  tokens/s {result.row_tokens / seconds:.0f}  eta {duration(eta_s)}{skipped}"
    )


async def _groups(actors: Services, prepared: Prepared, shown: Sequence[Shown]) -> list[ScoredRef]:
    """The demonstrations as groups; episodes are played side by side."""
    hosts = actors.environments
    length = prepared.lengths.max_length
    return await asyncio.gather(
        *(as_group(one, None if hosts is None else hosts.next(), length) for one in shown)
    )


def _held_out(prepared: Prepared) -> list[Shown]:
    count = min(HELD_OUT, prepared.task.eval_size())
    shown = (demonstration(prepared, prepared.task.eval_row(i), 0) for i in range(count))
    return [item for item in shown if item is not None]


async def held_out_loss(learner: Learner, shown: Sequence[ScoredRef]) -> float:
    """Mean negative log-likelihood of demonstrations in nats a token; NaN without any."""
    total, tokens = 0.0, 0
    for item in shown:
        assert isinstance(item.ref, ScoredGroup), "demonstrations stay in the driver"
        for ids, spans in scored_tokens(item.ref.group):
            # The first token of a sequence has no log-prob.
            logprobs = await learner.logprobs(ids)
            total -= math.fsum(logprobs[at - 1] for span in spans for at in span)
            tokens += sum(map(len, spans))
    return total / tokens if tokens else math.nan
