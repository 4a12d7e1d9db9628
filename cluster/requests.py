"""What a step asks the rollout actors for."""

from __future__ import annotations

from cohort.actors.records import Prompt, Request, SamplingSpec, derive_seed
from cohort.cluster.config import Config


def group_request(config: Config, step: int, prompt: Prompt, oldest: int = 0) -> Request:
    """What a step asks for a prompt: a group, whose seed is its own in every run and step.

    Args:
        config: Of the run.
        step: That the group is for.
        prompt: Of the group.
        oldest: The oldest weights that it may be begun with.
    """
    sampling = SamplingSpec(
        max_tokens=config.actors.max_tokens,
        temperature=config.actors.temperature,
        n=config.task.group_size,
        seed=derive_seed(config.run.seed, "rollout", step, prompt.id),
    )
    return Request(f"{step}:{prompt.id}", prompt, sampling, step=step, oldest=oldest)
