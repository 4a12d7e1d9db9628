"""How much of a step may fail before the run ends, and the errors that end it."""

from __future__ import annotations

from cohort.actors.errors import CohortError
from cohort.cluster.config import Config
from cohort.cluster.observe.metrics import reward_errors
from cohort.cluster.stream import Batch


class TrainingError(CohortError):
    """The run cannot go on; the message says why and which key to change."""


class ProgramError(Exception):
    """Code that the run calls is wrong; the message is its traceback."""


def check_failures(config: Config, batch: Batch) -> None:
    """Stop when too much of a step was lost or could not be scored, or none of it is there.

    Raises:
        TrainingError: more completions failed than `rewards.max_error_rate` allows.
        ProgramError: a program is wrong; trying again would not help.
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
    fraction, example = reward_errors(batch)
    if fraction > config.rewards.max_error_rate:
        raise TrainingError(
            f"step {batch.step}: {100 * fraction:.3g}% of the completions were lost or could not "
            f"be scored, more than rewards.max_error_rate={config.rewards.max_error_rate:g} allows."
            f" The first: {example}"
        )
