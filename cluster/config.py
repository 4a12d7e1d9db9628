"""The schema of a config: its sections and keys, their types, defaults and descriptions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cohort.actors.config import ActorsConfig
from cohort.actors.errors import CohortError
from cohort.actors.plain import JsonObject
from cohort.cluster.values import write_yaml
from cohort.learner.config import AlgorithmConfig, Dtype, LearnerConfig
from cohort.learner.lora_config import LoraConfig
from cohort.learner.presets import SECTION_PRESETS
from cohort.rewards.config import EnvironmentsConfig, RewardsConfig, TaskConfig


class ConfigError(CohortError):
    """The config is wrong; the message names the key and what to write instead."""

    exit_code = 2


class Section(BaseModel):
    """A part of the config: unknown keys are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Section):
    """What a run is called, how long it takes, what it keeps."""

    dir: str = Field("runs/default", description="Everything the run writes goes here.")
    steps: int = Field(100, ge=1, description="Optimizer steps of the whole run.")
    # torch takes 64 bits, and each rank of the learner adds its number.
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Seed of prompts, sampling and initialisation."
    )
    resume: bool = Field(
        False, description="Continue from the last complete checkpoint in run.dir."
    )
    checkpoint_every: int = Field(
        20,
        ge=0,
        description="Steps between checkpoints; the last step is always saved. 0: only that one.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Complete checkpoints to keep.")
    journal_gb: float = Field(
        4.0,
        gt=0,
        description="How much of the past journal/ keeps for `cohort replay`, in GiB; what a "
        "resume needs is never removed.",
    )
    keep_journal: bool = Field(
        False, description="Keep the whole journal, so that every step can be replayed."
    )
    evaluate_every: int = Field(
        0,
        ge=0,
        description="Steps between evaluations on task.eval_prompts held-out prompts, as `cohort "
        "eval` makes them. The best checkpoint by them is kept, as checkpoints/best. 0: none.",
    )
    allow_changed: list[str] = Field(
        default_factory=list,
        description="Keys that may differ when a run is resumed, as [run.steps]. Other changes of "
        "what is trained, and how, are refused; task.data and model.path stand for the files' "
        "contents, too.",
    )


class ModelConfig(Section):
    """The policy to train."""

    model_config = ConfigDict(protected_namespaces=())

    path: str = Field(description="A Hugging Face folder, or a hub id when the hub is reachable.")
    init_from: str | None = Field(
        None,
        description="Start from other weights of this architecture: a run directory (its newest "
        "checkpoint), a checkpoint, or an exported folder. Tokenizer and the KL's reference stay "
        "those of model.path. Unlike run.resume, optimizer and prompts start from the beginning.",
    )
    dtype: Literal["auto"] | Dtype = Field(
        "auto",
        description="Precision of engine and learner alike; float16 trains with loss scaling. "
        "Master weights are always float32. auto: the checkpoint's when a run is resumed; float32 "
        "where the run starts Ray on a machine without GPUs whose CPU has no bfloat16 arithmetic, "
        "and is many times slower in bfloat16; else bfloat16.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters beside the frozen model, as {rank: 16, alpha: 32, "
        "targets: [q_proj, v_proj]}: alpha / rank is their scale, targets name linear layers (left "
        "out: all but the output layer). Empty: all weights are trained. With it, model.init_from "
        "names an adapter.",
    )
    max_length: int | None = Field(
        None, ge=8, description="Prompt plus completion, tokens. Empty: as far as needed."
    )
    template_arguments: JsonObject = Field(
        default_factory=dict,
        description="Given to the model's chat template: {enable_thinking: false} for Qwen3. One "
        "that the template does not read is an error.",
    )

    @property
    def precision(self) -> Dtype:
        """The dtype; bfloat16 for auto where `prepare` has not chosen for this machine."""
        return "bfloat16" if self.dtype == "auto" else self.dtype


class ClusterConfig(Section):
    """Where the run finds its machines."""

    address: str | None = Field(
        None, description="Ray address. Empty: $RAY_ADDRESS, else a Ray of its own on this machine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda when the cluster has GPUs."
    )
    cores: Literal["auto", "shared", "own"] = Field(
        "auto",
        description="On one CPU machine. own: engines and learner have cores of their own, for "
        "overlapped training; shared: both use all. auto: own with actors.max_staleness of 1 or "
        "more where each engine and rank gets two cores, else shared.",
    )
    start_timeout_s: float = Field(300, gt=0, description="Longest wait for Ray to place an actor.")
    restarts: int = Field(
        5,
        ge=0,
        description="With --supervise: how often in a row a lost run is started again without "
        "getting further than before.",
    )
    stop_grace_s: float = Field(
        120,
        gt=0,
        description="With --supervise: longest time that a stopped run has to save.",
    )


class TrackingConfig(Section):
    """What is shown and logged, and where."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, offline without one."
    )
    project: str = Field("cohort", description="Weights & Biases project.")
    name: str | None = Field(None, description="Name of the W&B run. Empty: the run folder's name.")
    samples_per_step: int = Field(
        8, ge=0, description="Completions a step in the W&B table; rollouts/ keeps all."
    )
    table_every: int = Field(5, ge=1, description="Steps between W&B tables of completions.")
    console: Literal["auto", "rich", "plain"] = Field(
        "auto", description="auto: rich on a terminal, one plain line a step otherwise."
    )


class Config(Section):
    """The whole config of a run.

    Each attribute is a section with the keys of that name; `cohort keys` lists them all.

    Example:
        config = cohort.load_config("gsm8k.yaml", ["run.steps=100"])
        print(config.run.steps, config.actors.temperature)
    """

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig = TaskConfig()
    actors: ActorsConfig = ActorsConfig()
    rewards: RewardsConfig = RewardsConfig()
    environments: EnvironmentsConfig = EnvironmentsConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def completion_tokens(self) -> int:
        """Tokens of the longest completion: of one reply, or of all that an episode has."""
        if self.task.environment is None:
            return self.actors.max_tokens
        return self.actors.max_tokens * self.environments.max_turns

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: object) -> object:
        """Set what the algorithm's preset gives for other sections, unless the user gives it."""
        if not isinstance(given, dict) or not isinstance(given.get("algorithm"), dict):
            return given
        preset = given["algorithm"].get("preset")
        merged = dict(given)
        for section, values in SECTION_PRESETS.get(str(preset), {}).items():
            present = merged.get(section)
            if present is None or isinstance(present, dict):
                merged[section] = {**values, **(present or {})}
        return merged

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_default(cls, value: object) -> object:
        # A section whose every key is commented out.
        return {} if value is None else value


SECTIONS: dict[str, type[BaseModel]] = {
    name: kind for name, kind in get_type_hints(Config).items() if name in Config.model_fields
}


def all_keys() -> list[str]:
    """Every dotted key of the config, in order."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key present, in the order of the sections."""
    return write_yaml(config.model_dump())


def compact(config: Config) -> str:
    """The keys that differ from their defaults, one line a section, for the terminal."""
    lines = []
    for section, values in config.model_dump().items():
        fields = SECTIONS[section].model_fields
        body = " ".join(
            f"{key}={value}"
            for key, value in values.items()
            if value != fields[key].get_default(call_default_factory=True)
        )
        if body:
            lines.append(f"{section:<9}  {body}")
    return "\n".join(lines)


def expand(path: str) -> Path:
    """A path from the config with ~ and environment variables resolved."""
    return Path(os.path.expandvars(path)).expanduser()
