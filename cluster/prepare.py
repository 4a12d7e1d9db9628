"""What is checked and loaded before anything starts: model folder, task, rewards, lengths.

Nothing here needs Ray, an engine or a learner; nothing is written except a folder for passing logs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.lengths import check_lengths, render_rows
from cohort.cluster.model_folder import inspect_model, load_tokenizer
from cohort.rewards.tasks import PromptRenderer, Task, load_task, sample_rows
from cohort.rewards.worker import RewardSpec, RewardWorker, reward_specs

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is started."""

    config: Config
    model_path: str
    parameters: int
    task: Task
    rewards: list[RewardSpec]
    renderer: PromptRenderer
    max_length: int
    overlong: int


def prepare(config: Config) -> Prepared:
    """Load and check everything that needs no actor: model folder, task, rewards, lengths.

    Raises RunError, ConfigError, TaskError or RewardLoadError; writes nothing.
    """
    path, context, parameters = inspect_model(config)
    tokenizer = load_tokenizer(path)
    task = load_task(config.task, config.run.seed)
    specs = reward_specs(task, config.rewards)
    # Loads every function in a child process, as the reward actors will: a wrong path ends here.
    limits = config.rewards
    actor = RewardWorker(specs, limits.timeout_s, memory_bytes=limits.memory_bytes)
    specs = actor.specs
    actor.close()
    renderer = make_renderer(config, tokenizer, context)
    lengths = check_lengths(config, render_rows(task, renderer), renderer, specs)
    return Prepared(
        config=config,
        model_path=path,
        parameters=parameters,
        task=task,
        rewards=specs,
        renderer=renderer,
        max_length=lengths.max_length,
        overlong=lengths.overlong,
    )


def longest_prompt(config: Config, context: int) -> int:
    """Tokens of the longest prompt that leaves room for a completion in the model's context.

    Raises RunError when none does, or model.max_length exceeds the context.
    """
    if config.model.max_length and config.model.max_length > context:
        raise RunError(
            f"model.max_length={config.model.max_length} exceeds the model's context of {context}"
        )
    longest = (config.model.max_length or context) - config.actors.max_tokens
    if longest < 1:
        raise RunError(
            f"actors.max_tokens={config.actors.max_tokens} fills the model's context of {context} "
            "and leaves no room for a prompt"
        )
    return longest


def make_renderer(config: Config, tokenizer: Any, context: int) -> PromptRenderer:
    """What renders this config's prompts; context: the model's, in tokens.

    Raises RunError when the context has no room for a prompt, TaskError for template arguments
    that the chat template does not read.
    """
    return PromptRenderer(
        tokenizer,
        longest_prompt(config, context),
        config.model.template_arguments,
        config.task.overlong,
    )


@contextmanager
def passing_logs(command: str) -> Iterator[Path]:
    """A folder for the logs of a command that has no run directory.

    It stays when the block raises: the error's message may name a file in it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"cohort-{command}-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def first_probe(prepared: Prepared) -> list[int]:
    """A fixed token sequence made of the task's own prompts: what engines are compared on."""
    task = prepared.task
    ids: list[int] = []
    for cursor in count():
        # A prompt has at least one token.
        ((epoch, row),) = sample_rows(task, 0, cursor, 1)
        ids += prepared.renderer.render(row, epoch).token_ids
        if len(ids) >= PROBE_TOKENS or (len(ids) > 1 and cursor + 1 >= task.train_size()):
            break
    return ids[: min(PROBE_TOKENS, prepared.max_length - 1)]
