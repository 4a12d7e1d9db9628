"""The whole config: typed, strict, YAML plus `key=value` overrides."""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from actors.config import ActorsConfig
from learner.config import SECTION_PRESETS, AlgorithmConfig, Dtype, LearnerConfig
from rewards.config import RewardsConfig, TaskConfig


class RunConfig(BaseModel):
    """What a run is called, how long it takes, what it keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: str = Field("runs/default", description="Everything the run writes goes here.")
    steps: int = Field(100, ge=1, description="Optimizer steps of the whole run.")
    seed: int = Field(0, ge=0, description="Seed of prompts, sampling and initialisation.")
    resume: bool = Field(
        False, description="Continue from the last complete checkpoint in run.dir."
    )
    checkpoint_every: int = Field(
        20,
        ge=0,
        description="Steps between checkpoints; the last step is always saved. 0: only it.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Complete checkpoints to keep.")


class ModelConfig(BaseModel):
    """The policy to train."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    path: str = Field(description="A Hugging Face folder, or a hub id when the hub is reachable.")
    dtype: Dtype = Field(
        "bfloat16",
        description="Precision of engine and learner alike; float16 trains with loss scaling. "
        "Master weights are always float32.",
    )
    max_length: int | None = Field(
        None, ge=8, description="Prompt plus completion, tokens. Empty: as far as needed."
    )


class ClusterConfig(BaseModel):
    """Where the run finds its machines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(
        None, description="Ray address. Empty: $RAY_ADDRESS, else a Ray of its own on this machine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda when the cluster has GPUs."
    )
    start_timeout_s: float = Field(300, gt=0, description="Longest wait for Ray to place an actor.")


class TrackingConfig(BaseModel):
    """What is shown and logged, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


class Config(BaseModel):
    """The whole config of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig = TaskConfig()
    actors: ActorsConfig = ActorsConfig()
    rewards: RewardsConfig = RewardsConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        """What the algorithm's preset sets in other sections, below what the user gives there."""
        algorithm = given.get("algorithm") if isinstance(given, dict) else None
        preset = algorithm.get("preset") if isinstance(algorithm, dict) else None
        if not isinstance(preset, str) or preset not in SECTION_PRESETS:
            return given
        merged = dict(given)
        for section, values in SECTION_PRESETS[preset].items():
            present = merged.get(section)
            if present is None or isinstance(present, dict):
                merged[section] = {**values, **(present or {})}
        return merged

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        # A section whose every key is commented out.
        return {} if value is None else value


SECTIONS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "task": TaskConfig,
    "actors": ActorsConfig,
    "rewards": RewardsConfig,
    "learner": LearnerConfig,
    "algorithm": AlgorithmConfig,
    "cluster": ClusterConfig,
    "tracking": TrackingConfig,
}


class ConfigError(Exception):
    """The config is wrong; the message names the key and what to write instead."""


def all_keys() -> list[str]:
    """Every dotted key of the config, in order."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-6 is a number, as people write it, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                # PyYAML keeps the last one without a word.
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back the same: a string that looks like 1e-6 gets quotes."""


_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
for _class in (_Loader, _Dumper):
    # After the resolver of integers, so that 12 stays one.
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `a.b=1`, `--a.b=1` and `--a.b 1` into {"a.b": 1}; values are YAML.

    Raises ConfigError for an argument without a value.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag = argument.startswith("--")
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            if not flag:
                raise ConfigError(f"'{argument}' is not key=value")
            # A bare flag is true: `--resume`, `--run.resume`.
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            if "=" in value and "." in value.partition("=")[0]:
                rest.insert(0, value)
                value = "true"
        key = {"resume": "run.resume"}.get(key, key).replace("-", "_")
        try:
            found[key] = _read_yaml(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read the value '{value}': {error}") from error
    return found


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Raises ConfigError with one line per mistake: unknown keys (with the nearest name), values of
    the wrong type or out of range, contradictions between keys.
    """
    tree: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"no config file at {file}")
        try:
            tree = _read_yaml(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            raise ConfigError(f"{file} must hold sections (run:, model:, ...), not {tree!r}")
    for dotted, value in parse_overrides(overrides or []).items():
        node = tree
        *parents, leaf = dotted.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: '{parent}' is a value, not a section")
        node[leaf] = value
    tree.setdefault("model", {})  # so that what is missing is model.path
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree)) from error
    problems = contradictions(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _explain(error: ValidationError, tree: Any) -> str:
    lines = []
    for item in error.errors():
        if item["type"] == "string_type" and isinstance(item["input"], dict):
            continue  # one branch of `mapping or string`; the other one says what is wrong
        dotted = ".".join(_location(item["loc"], tree))
        if item["type"] == "extra_forbidden":
            lines.append(f"{dotted}: unknown key{_hint(dotted)}")
        elif item["type"] == "missing":
            lines.append(f"{dotted}: required, and not given")
        elif item["type"] == "model_type":
            lines.append(f"{dotted}: a section of keys, not a value (got {item['input']!r})")
        else:
            lines.append(f"{dotted}: {item['msg']} (got {item['input']!r})")
    return "\n".join(lines)


def _location(loc: tuple[int | str, ...], tree: Any) -> list[str]:
    """The path of an error in the file: pydantic's, without the names of union branches."""
    parts, node = [], tree
    for place, part in enumerate(loc):
        if node is None:
            node = {}  # an empty section
        if isinstance(node, dict) and (part in node or place == len(loc) - 1):
            parts.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            parts.append(str(part))
            node = node[part]
    return parts


# Why there is no such key: these bend the engine's log-probs away from the policy's.
BIASED_SAMPLING = {
    "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "typical_p",
}  # fmt: skip


def _hint(dotted: str) -> str:
    """Why there is no such key, the key that was probably meant, else the keys there are."""
    if dotted.split(".")[-1] in BIASED_SAMPLING:
        return (
            "; refused in training: tokens would come from another distribution than the one "
            "the learner scores, and every ratio would be wrong. Use actors.temperature"
        )
    keys, sections = all_keys(), list(Config.model_fields)
    section, _, _ = dotted.rpartition(".")
    leaf = dotted.split(".")[-1]
    # The same name elsewhere; a similar name in this section; a similar section; a similar name.
    near = [key for key in keys if key.split(".")[-1] == leaf]
    here = {key.split(".")[-1]: key for key in keys if key.rpartition(".")[0] == section}
    near = near or [here[name] for name in difflib.get_close_matches(leaf, here, n=1)]
    if not section:
        near = near or difflib.get_close_matches(leaf, sections, n=1)
    names = {key.split(".")[-1]: key for key in keys}
    near = near or [names[name] for name in difflib.get_close_matches(leaf, names, n=1)]
    if near:
        return f"; did you mean {near[0]}?"
    if here:
        return f"; {section} has {', '.join(here)}"
    return "" if section else f"; the sections are {', '.join(sections)}"


def contradictions(config: Config) -> list[str]:
    """What can be known to be wrong before anything starts, one line each."""
    problems = [
        f"{section}.{key}: must be finite (got {value})"
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    problems += config.algorithm.contradictions() + config.learner.contradictions()
    if config.algorithm.objective == "cross_entropy":
        problems.append(
            "algorithm.objective=cross_entropy learns from demonstrations, not from rewards: leave "
            "it out and run `cohort warmup`, which sets it, then train from what that writes"
        )
    if config.model.dtype == "float16" and config.learner.zero_stage == 0:
        problems.append(
            "model.dtype=float16 needs learner.zero_stage=1 or more: without ZeRO, scaled "
            "gradients add up in float16, where they overflow"
        )
    if config.model.dtype == "float16" and config.learner.float8 != "off":
        problems.append(
            f"learner.float8={config.learner.float8} needs model.dtype=bfloat16 or float32"
        )
    prompts, group = config.task.prompts_per_step, config.task.group_size
    if config.algorithm.update_on == "share" and config.algorithm.updates_per_step > prompts:
        problems.append(
            f"algorithm.updates_per_step={config.algorithm.updates_per_step} shares of "
            f"task.prompts_per_step={prompts} groups: some would be empty"
        )
    if prompts < config.learner.workers:
        problems.append(
            f"task.prompts_per_step={prompts} is less than learner.workers="
            f"{config.learner.workers}: some ranks would have nothing to train on"
        )
    if prompts % config.learner.workers:
        problems.append(
            f"task.prompts_per_step={prompts} must be a multiple of learner.workers="
            f"{config.learner.workers}"
        )
    if group > config.actors.max_concurrent:
        problems.append(
            f"task.group_size={group} exceeds actors.max_concurrent="
            f"{config.actors.max_concurrent}: a group is generated by one engine at once"
        )
    if config.model.max_length is not None and config.actors.max_tokens >= config.model.max_length:
        problems.append(
            f"actors.max_tokens={config.actors.max_tokens} leaves no room for a prompt in "
            f"model.max_length={config.model.max_length}"
        )
    if config.task.name == "dataset" and not config.task.data:
        problems.append("task.data: required by task.name=dataset")
    if config.task.name != "dataset" and (config.task.data or config.task.eval_data):
        problems.append(f"task.data is only read by task.name=dataset, not by {config.task.name}")
    return problems


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key present, in the order of the sections."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def compact(config: Config) -> str:
    """The resolved config, one line a section, for the terminal."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        body = " ".join(f"{key}={value}" for key, value in values.items() if value is not None)
        lines.append(f"{section:>10}  {body}")
    return "\n".join(lines)


def expand(path: str) -> Path:
    """A path from the config with ~ and environment variables resolved."""
    return Path(os.path.expandvars(path)).expanduser()
