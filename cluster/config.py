"""The whole config: typed, strict, YAML plus `key=value` overrides."""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cohort.actors.config import ActorsConfig
from cohort.actors.errors import CohortError
from cohort.cluster.values import ValueProblem, kind_at, read_value, read_yaml, typed, write_yaml
from cohort.learner.config import SECTION_PRESETS, AlgorithmConfig, Dtype, LearnerConfig
from cohort.rewards.config import RewardsConfig, TaskConfig


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
    allow_changed: list[str] = Field(
        default_factory=list,
        description="Keys that may differ when a run is resumed, as [run.steps]. Other changes of "
        "what is trained, and how, are refused; task.data and model.path stand for the files' "
        "contents, too.",
    )


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
    template_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Given to the model's chat template: {enable_thinking: false} for Qwen3. One "
        "that the template does not read is an error.",
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


class ConfigError(CohortError):
    """The config is wrong; the message names the key and what to write instead."""

    exit_code = 2


# What pydantic takes for a bool.
SWITCH = frozenset(["true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0"])


def all_keys() -> list[str]:
    """Every dotted key of the config, in order."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `a.b=1`, `--a.b=1` and `--a.b 1` into {"a.b": 1}; values are read by the key's type.

    Raises ConfigError for an argument without a value, and for a value that cannot be read.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag = argument.startswith("--")
        name, equals, value = argument.removeprefix("--").partition("=")
        key = _full_key(name)
        kind = kind_at(Config, key.split("."))
        if not equals:
            if not flag:
                raise ConfigError(f"'{argument}' is not key=value")
            following = _value_after(rest, kind)
            if following is None:
                raise ConfigError(f"{key}: no value follows {argument}")
            value = following
        # The last one counts, also against a section given as a whole.
        found.pop(key, None)
        try:
            found[key] = read_value(value, kind, key)
        except ValueProblem as error:
            raise ConfigError(f"{key}: cannot read the value '{value}': {error}") from error
    return found


def _value_after(rest: list[str], kind: Any) -> str | None:
    """Take the value of a flag without "=" off what follows it; None where it needs one."""
    following = rest[0] if rest and not rest[0].startswith("--") else None
    if kind is bool or kind is Any:
        # A bare flag is true: `--resume`, `--run.resume`.
        another = following is not None and re.match(r"[A-Za-z_]+\.[^=]*=", following)
        if following is None or another or (kind is bool and following.lower() not in SWITCH):
            return "true"
    return None if following is None else rest.pop(0)


def _full_key(name: str) -> str:
    """The dotted key that a name on the command line means; names inside dicts stay as they are."""
    section, *inner = {"resume": "run.resume"}.get(name, name).split(".")
    return ".".join([section, *[part.replace("-", "_") for part in inner[:1]], *inner[1:]])


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Raises ConfigError with one line per mistake: unknown keys (with the nearest name), values of
    the wrong type or out of range, contradictions between keys.
    """
    config = parse_config(path, overrides)
    problems = contradictions(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """As `load_config`, but keys are not checked against each other."""
    tree = {} if path is None else read_tree(Path(path))
    given = parse_overrides(overrides or [])
    for place, (dotted, value) in enumerate(given.items()):
        _set(tree, dotted, value, list(given)[:place])
    tree.setdefault("model", {})  # so that what is missing is model.path
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree)) from error


def read_tree(file: Path) -> dict[str, Any]:
    """The sections of a config file, each value as its key's type, not yet checked.

    The file is UTF-8, whatever the locale. Raises ConfigError.
    """
    if not file.is_file():
        raise ConfigError(f"no config file at {file}")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file} is not UTF-8 text (line {line}, byte 0x{raw[error.start]:02x}): save it as "
            "UTF-8"
        ) from error
    try:
        tree = typed(read_yaml(text), Config)
    except ValueProblem as error:
        raise ConfigError(f"{file} is not a config: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold sections (run:, model:, ...), not {tree!r}")
    dotted = [key for key in tree if isinstance(key, str) and "." in key]
    if dotted:
        section, _, name = dotted[0].partition(".")
        raise ConfigError(
            f"{file}: write {dotted[0]} as a section, `{section}:` and below it `  {name}: ...`; "
            "dotted names are for the command line"
        )
    return tree


def _set(tree: dict[str, Any], dotted: str, value: Any, before: list[str]) -> None:
    """Put one override into the tree. before: the overrides that are there already."""
    node = tree
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            what = "a list: give all of it" if isinstance(node, list) else "a value, not a section"
            raise ConfigError(f"{dotted}: '{parent}' is {what}")
    if dotted in SECTIONS and (value is None or isinstance(value, dict)):
        node[leaf] = {**(node.get(leaf) or {}), **(value or {})}
        return
    parts = [key for key in before if key.startswith(f"{dotted}.")]
    if parts:
        raise ConfigError(f"{dotted}: replaces {parts[0]}, which stands before it; give it first")
    node[leaf] = value


def _explain(error: ValidationError, tree: Any) -> str:
    lines = []
    for item in error.errors():
        if _other_branch(item["loc"], item["type"], [other["loc"] for other in error.errors()]):
            continue
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


def _other_branch(
    loc: tuple[int | str, ...], problem: str, all_locs: list[tuple[int | str, ...]]
) -> bool:
    """Whether an error says only that a mapping is no text, in `mapping or text`, where the other
    branch says what is wrong with the mapping."""
    if problem != "string_type" or loc[-1] != "str":
        return False
    return any(other[: len(loc) - 1] == loc[:-1] and len(other) > len(loc) for other in all_locs)


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
            node = node[part] if part < len(node) else None
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
    for key in config.run.allow_changed:
        if key not in all_keys():
            near = difflib.get_close_matches(key, all_keys(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"run.allow_changed: there is no key {key}{hint}")
    if config.task.name == "dataset" and not config.task.data:
        problems.append("task.data: required by task.name=dataset")
    if config.task.name != "dataset" and (config.task.data or config.task.eval_data):
        problems.append(f"task.data is only read by task.name=dataset, not by {config.task.name}")
    return problems


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
