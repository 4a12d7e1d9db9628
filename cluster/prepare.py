"""Loading and checking before anything starts: model folder, task, rewards, prompt lengths.

Nothing here needs Ray, an engine or a learner; nothing is written except a folder for logs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.cluster.adapter_folder import starting_adapter, trained_parameters
from cohort.cluster.config import Config, expand
from cohort.cluster.errors import RunError
from cohort.cluster.lengths import Lengths, check_lengths, render_rows
from cohort.cluster.model_folder import inspect_model, load_tokenizer, starting_weights
from cohort.cluster.placement import bfloat16_on_this_cpu, this_machine
from cohort.cluster.ray_start import ray_address
from cohort.learner.checkpoint import dtype_of, latest
from cohort.rewards.continuation import Continuation
from cohort.rewards.environments.specs import environment_spec, find_tools, gives_rewards
from cohort.rewards.environments.worker import EnvironmentSpec, try_environment
from cohort.rewards.rates import NO_RATES, PassRates
from cohort.rewards.specs import RewardSpec, reward_specs
from cohort.rewards.tasks import (
    PromptRenderer,
    SampledPrompts,
    Task,
    TaskError,
    load_task,
    sample_prompts,
    sample_rows,
)
from cohort.rewards.worker import RewardWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Prepared:
    """A config with everything that was loaded for it.

    Attributes:
        config: The run's config, its precision chosen.
        model_path: A local folder or a hub id.
        parameters: Of the model.
        task: The loaded task.
        rewards: The reward functions in use.
        renderer: Renders the task's rows to prompts.
        lengths: Of its prompts, in tokens.
        init_from: The folder of the weights (or adapter) to start from; None: those of
            `model_path`, or of the checkpoint that a run is resumed from.
        trained: Of the adapters that are trained; None: all parameters are.
    """

    config: Config
    model_path: str
    parameters: int
    task: Task
    rewards: list[RewardSpec]
    renderer: PromptRenderer
    lengths: Lengths
    init_from: Path | None = None
    trained: int | None = None

    def environment(self) -> EnvironmentSpec | None:
        """What a worker of environments gets; None: there is no environment."""
        if self.config.task.environment is None:
            return None
        return environment_spec(
            self.config.task,
            self.config.environments,
            model_path=self.model_path,
            template_arguments=self.config.model.template_arguments,
            max_length=self.lengths.max_length,
            temperature=self.config.actors.temperature,
        )

    def draw(self, cursor: int, count: int, rates: PassRates = NO_RATES) -> SampledPrompts:
        """So many training prompts from a place in their sequence on, and the place after them."""
        return sample_prompts(self.task, self.renderer, self.config.run.seed, cursor, count, rates)


def prepare(config: Config) -> Prepared:
    """Load and check everything that needs no actor; writes nothing.

    Raises:
        CohortError: A RunError, ConfigError, TaskError or RewardLoadError.
    """
    config = with_dtype(config)
    path, context, parameters = inspect_model(config)
    trained = trained_parameters(config, path)
    tokenizer = load_tokenizer(path)
    task = load_task(config.task, config.run.seed)
    specs = reward_specs(task, config.rewards, environment=config.task.environment is not None)
    # Load every function in a child process, as the reward workers will: a wrong path ends here.
    limits = config.rewards
    worker = RewardWorker(specs, limits.timeout_s, memory_bytes=limits.memory_bytes)
    specs = worker.specs
    worker.close()
    renderer = make_renderer(config, tokenizer, context)
    lengths = check_lengths(config, render_rows(task, renderer), renderer, specs)
    starting = starting_weights if config.model.lora is None else starting_adapter
    start = None if resumed_checkpoint(config) else starting(config)
    prepared = Prepared(config, path, parameters, task, specs, renderer, lengths, start, trained)
    environment = prepared.environment()
    if environment is not None:
        # Demonstrations are learned without any.
        learns = config.algorithm.objective != "cross_entropy"
        if learns and not specs and not gives_rewards(config.task):
            raise TaskError(
                f"nothing gives a reward: task.environment={config.task.environment} has tools and "
                "no `get_reward`. Name functions in rewards.functions, or a class with `get_reward`"
            )
        # It too, in a process of its own.
        try_environment(environment)
    return prepared


def with_dtype(config: Config) -> Config:
    """The config with a precision in the place of model.dtype=auto."""
    if config.model.dtype != "auto":
        return config
    checkpoint = resumed_checkpoint(config)
    alone = config.cluster.device != "cuda" and ray_address(config) is None
    dtype = "bfloat16"
    if checkpoint is not None:
        dtype = dtype_of(checkpoint)
    elif (
        alone
        and not bfloat16_on_this_cpu()
        and (config.cluster.device == "cpu" or this_machine().gpus == 0)
    ):
        dtype = "float32"
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def resumed_checkpoint(config: Config) -> Path | None:
    """The checkpoint that this run goes on from; None for a new run."""
    return latest(expand(config.run.dir) / "checkpoints") if config.run.resume else None


def longest_prompt(config: Config, context: int) -> int:
    """Tokens of the longest prompt that leaves room for a completion in the model's context.

    Raises:
        RunError: None does, or model.max_length exceeds the context.
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


def make_renderer(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int
) -> PromptRenderer:
    """Make the renderer of this config's prompts.

    Args:
        config: Of the run.
        tokenizer: The model's.
        context: The model's longest sequence, tokens.

    Raises:
        RunError: The context has no room for a prompt.
        EnvironmentLoadError: The environment cannot be loaded, or a tool cannot be described.
        TaskError: The chat template does not read one of model.template_arguments.
    """
    conversation = None
    if config.task.environment is not None:
        tools = find_tools(config.task)
        conversation = Continuation(tokenizer, tools, config.model.template_arguments).prompt_ids
    return PromptRenderer(
        tokenizer,
        longest_prompt(config, context),
        config.model.template_arguments,
        config.task.overlong,
        conversation,
    )


@contextmanager
def passing_logs(command: str) -> Iterator[Path]:
    """A folder for the logs of a command that has no run directory.

    It is kept when the block raises, because the error's message may name a file in it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"cohort-{command}-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def first_probe(prepared: Prepared) -> list[int]:
    """A fixed token sequence of the task's own prompts, on which engines are compared."""
    task = prepared.task
    ids: list[int] = []
    for cursor in count():
        # A prompt has at least one token.
        ((epoch, row),) = sample_rows(task, 0, cursor, 1)
        ids += prepared.renderer.render(row, epoch).token_ids
        if len(ids) >= PROBE_TOKENS or (len(ids) > 1 and cursor + 1 >= task.train_size()):
            break
    return ids[: min(PROBE_TOKENS, prepared.lengths.max_length - 1)]
