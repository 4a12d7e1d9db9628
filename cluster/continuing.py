"""Where a run goes on from, and the comparison with the run that was saved.

A difference between the two is refused unless it is known to leave rows, schedule and objective as
they are, or `run.allow_changed` names its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from pydantic import JsonValue

from cohort.cluster.config import SECTIONS, ClusterConfig, Config, RunConfig, TrackingConfig
from cohort.cluster.errors import RunError
from cohort.cluster.files import write_atomically
from cohort.cluster.fingerprint import COMMIT, ConfigTree, Fingerprint
from cohort.cluster.observe.metrics_file import read_metrics
from cohort.cluster.stream import Ahead
from cohort.learner.aside import Aside
from cohort.learner.checkpoint import check_shape, latest, load_state, shape_of
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.optimizer import lr_at

# Keys that change neither what is trained nor how. Whether the learner can take the checkpoint's
# shape (learner.workers, learner.zero_stage, model.dtype) is looked at by itself.
HARMLESS = {
    "cluster": set(ClusterConfig.model_fields),
    "tracking": set(TrackingConfig.model_fields),
    "run": {
        "checkpoint_every",
        "keep_checkpoints",
        "journal_gb",
        "keep_journal",
        "evaluate_every",
    },
    "task": {"solved_at", "eval_prompts"},
    # The checkpoint has weights of its own.
    "model": {"dtype", "init_from"},
    "actors": {
        "count", "max_staleness", "max_concurrent", "kv_cache_gib", "gpu_memory", "tensor_parallel",
        "compile", "quantization", "start_timeout_s", "group_timeout_s", "sync_timeout_s",
        "probe_tolerance",
    },
    "rewards": {"workers", "timeout_s", "memory_gb", "max_error_rate"},
    "environments": {"workers", "step_timeout_s", "episode_timeout_s", "memory_gb", "secrets"},
    "learner": {
        "workers", "zero_stage", "micro_batch_tokens", "logit_chunk_tokens", "attention",
        "gradient_checkpointing", "offload", "deepspeed", "float8", "max_skipped_steps",
        "step_timeout_s", "keep_copy",
    },
    # The keys that a preset sets are compared.
    "algorithm": {"preset"},
}  # fmt: skip
# How a run is resumed is not part of what it is.
NOT_COMPARED = ("run.dir", "run.resume", "run.allow_changed")
# What others would break, by key or section.
BREAKS = {
    "run.seed": "other rows may be held out, and come in another order",
    "run.steps": "the learning rate's schedule ends there",
    "model.path": "another model, tokenizer or template",
    "model.lora": "other weights are trained than those that were saved",
    "model": "the same rows become other prompts, or are left out",
    "task.prompts_per_step": "other steps than those that the schedule counts",
    "task.group_size": "advantages of other groups",
    "task.environment": "another objective",
    "task.environment_options": "another objective",
    "task.history": "completions of another distribution",
    "environments": "completions of another distribution",
    "task": "rows that are held out now, or trained already, may be trained",
    "actors": "completions of another distribution",
    "rewards": "another objective",
    "learner": "the learning rate or the optimizer's state does not fit",
    "algorithm": "another objective",
}
# The keys that decide the learning rate of an update.
RATE_KEYS = (
    "run.steps",
    "learner.learning_rate",
    "learner.warmup_steps",
    "learner.lr_schedule",
    "learner.lr_final",
)
SHOWN = 48
# The digest of what is not there.
NONE = "none"


class SavedAhead(TypedDict):
    """What `GroupStream.ahead` says, as JSON.

    Attributes:
        steps: Of each step its number, where its prompts begin, and how many were asked for.
        cursor: As in `Ahead`.
    """

    steps: list[list[int]]
    cursor: int


class Best(TypedDict):
    """The best evaluation of a run, as JSON."""

    step: int
    score: float


class SavedState(TypedDict):
    """The driver's own state in a checkpoint, as JSON.

    Attributes:
        step: Steps that are done.
        cursor: Position in the sequence of training prompts at which the next step begins.
        counters: What `Counters.resumed` takes.
        tracking: What the tracker goes on with.
        pass_rates: What the task's history of pass rates goes on with; None for tasks without one.
        fingerprint: What the resumed run is compared with; older checkpoints have none.
        ahead: What is drawn already for later steps; older checkpoints do not say.
        best: The best evaluation so far: its step, and its score; there where one was made.
    """

    step: int
    cursor: int
    counters: dict[str, int]
    tracking: dict[str, str | None]
    pass_rates: dict[str, JsonValue] | None
    fingerprint: NotRequired[Fingerprint]
    ahead: NotRequired[SavedAhead]
    best: NotRequired[Best]


NEW_RUN: SavedState = {
    "step": 0,
    "cursor": 0,
    "counters": {},
    "tracking": {"wandb_id": None},
    "pass_rates": None,
}


def saved_ahead(state: SavedState) -> Ahead | None:
    """What is drawn already for later steps; None where the checkpoint does not say."""
    saved = state.get("ahead")
    if saved is None:
        return None
    steps = {step: (first, count) for step, first, count in saved["steps"]}
    return Ahead(steps, saved["cursor"])


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run goes on from, and the driver's state in it."""

    checkpoint: Path
    state: SavedState

    @classmethod
    def load(cls, checkpoint: Path) -> Saved:
        return cls(checkpoint, cast(SavedState, load_state(checkpoint)))

    @property
    def step(self) -> int:
        return self.state["step"]


def where_to_go_on(config: Config, folder: Path) -> Saved | None:
    """The newest complete checkpoint if the run is to be resumed; None to begin at step 0.

    Raises:
        RunError: The folder's metrics cannot be read.
    """
    try:
        read_metrics(folder / "metrics.jsonl")
    except ValueError as error:
        raise RunError(f"{error}: move that file away, or choose another run.dir") from error
    found = latest(folder / "checkpoints") if config.run.resume else None
    return Saved.load(found) if found else None


def compare(config: Config, saved: Saved, now: Fingerprint) -> str:
    """Compare this run with the one that was saved.

    Args:
        config: This run's config.
        saved: The checkpoint to go on from.
        now: This run's fingerprint.

    Returns:
        A message about what has changed; empty when nothing has.

    Raises:
        RunError: Something differs that must not, and run.allow_changed does not name it.
        CheckpointError: This learner cannot load the checkpoint.
    """
    before = saved.state.get("fingerprint")
    found = differences(before, now, saved.step) if before else []
    if wrong := refused(found, config.run.allow_changed):
        keys = ",".join(dict.fromkeys(item.key for item in wrong))
        raise RunError(
            f"run.dir={saved.checkpoint.parent.parent}: not resumed, because this run differs from "
            f"the one that was saved after step {saved.step}:\n{table(wrong)}\nSet these back, or "
            "choose another run.dir for a new run. To go on with the changes all the same: "
            f"'run.allow_changed=[{keys}]'"
        )
    learner, model = config.learner, config.model
    check_shape(saved.checkpoint, learner.workers, learner.zero_stage, model.precision, model.lora)
    ranks, stage = shape_of(saved.checkpoint)
    divided = ""
    if (ranks, stage) != (learner.workers, learner.zero_stage):
        divided = (
            f"the learner's state was saved by {ranks} rank(s) under ZeRO-{stage}, and is divided "
            f"anew among {learner.workers} under ZeRO-{learner.zero_stage}\n"
        )
    if not before:
        return (
            f"{divided}{saved.checkpoint} is of an older version and holds no fingerprint of its "
            "run: whether data, model and config are the same is not known"
        )
    return divided + (f"changed since the checkpoint:\n{table(found)}" if found else "")


def planned_saves(config: Config, first_step: int) -> int:
    """How many checkpoints this run will write."""
    every, steps = config.run.checkpoint_every, config.run.steps
    periodic = (steps - 1) // every - first_step // every if every else 0
    return periodic + 1


def write_config(file: Path, text: str, aside: Aside) -> None:
    """Write config.yaml; a different one (run.resume aside) is moved away first."""
    off, on = "resume: false", "resume: true"
    if file.exists() and file.read_text(encoding="utf-8").replace(off, on) != text.replace(off, on):
        aside.move(file)
    write_atomically(file, text)


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was saved.

    Attributes:
        key: The config key that stands for it.
        saved: Its value in the checkpoint.
        now: Its value in this run.
        breaks: What the change would break; empty when nothing.
        what: What differs, where the key stands for more than its value.
    """

    key: str
    saved: str
    now: str
    breaks: str = ""
    what: str = ""

    @property
    def name(self) -> str:
        return f"{self.key} ({self.what})" if self.what else self.key


def differences(saved: Fingerprint, now: Fingerprint, step: int) -> list[Difference]:
    """Compare two fingerprints.

    Args:
        saved: The checkpoint's.
        now: That of the run that goes on.
        step: The steps that are done in the checkpoint.
    """
    rows_key = "task.data" if now["config"]["task"]["data"] else "task.name"
    rows = [
        Difference(rows_key, before, after, BREAKS["task"], f"{name} rows")
        for name, before, after in _unequal(saved["rows"], now["rows"])
    ]
    # A folder and a hub id cannot be compared, only their names.
    comparable = (COMMIT in saved["model"]) == (COMMIT in now["model"])
    model = [
        Difference("model.path", before, after, BREAKS["model.path"], name)
        for name, before, after in _unequal(saved["model"], now["model"])
        if comparable
    ]
    same = set()
    if not rows:
        # The same rows from another place.
        same |= {"task.data", "task.eval_data"}
    if saved["model"] and now["model"] and comparable and not model:
        same.add("model.path")
    config = [
        Difference(key, str(before), str(after), "" if key in same else breaks)
        for key, before, after, breaks in _config(saved["config"], now["config"], step)
    ]
    code = [
        Difference(name.partition(":")[0], before, after, what=name.partition(": ")[2])
        for name, before, after in _unequal(saved["code"], now["code"])
        # A function that is there only once is in the config's difference.
        if NONE not in (before, after)
    ]
    return config + rows + model + code


def refused(found: Sequence[Difference], allowed: Sequence[str]) -> list[Difference]:
    """The differences that keep a run from going on.

    Args:
        found: All differences.
        allowed: The keys of run.allow_changed.
    """
    return [item for item in found if item.breaks and item.key not in allowed]


def table(found: Sequence[Difference]) -> str:
    """Key, saved and current value, and what the change breaks, in columns."""
    rows = [("key", "saved", "now", "")]
    rows += [
        (item.name, _short(item.saved), _short(item.now), _short(item.breaks, 80)) for item in found
    ]
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(
        f"  {key:<{first}}  {saved:<{second}}  {now:<{third}}  {breaks}".rstrip()
        for key, saved, now, breaks in rows
    )


def _config(
    saved: ConfigTree, now: ConfigTree, step: int
) -> Iterator[tuple[str, JsonValue, JsonValue, str]]:
    """Each config key that differs: its saved value, its current one, what the change breaks."""
    for section, values in now.items():
        for name, after in values.items():
            key = f"{section}.{name}"
            # A key that this release has added had its default's effect.
            default = SECTIONS[section].model_fields[name].get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            before = saved.get(section, {}).get(name, default)
            if before == after or key in NOT_COMPARED:
                continue
            breaks = BREAKS.get(key) or BREAKS.get(section, "not known to be harmless")
            if name in HARMLESS[section]:
                breaks = ""
            if key in RATE_KEYS:
                changed = {**saved, section: {**saved[section], name: after}}
                rates = _next_rate(saved, step), _next_rate(changed, step)
                if rates[0] != rates[1]:
                    breaks = f"the learning rate would jump from {rates[0]:.3g} to {rates[1]:.3g}"
                elif key == "run.steps" and not (_ends_with_run(saved) or _ends_with_run(now)):
                    breaks = ""
            yield key, before, after, breaks


def _ends_with_run(config: ConfigTree) -> bool:
    """Whether the learning rate falls towards the run's last step."""
    return config["learner"]["lr_schedule"] != "constant"


def _next_rate(config: ConfigTree, step: int) -> float:
    """Learning rate of the first update after the checkpoint."""
    updates = AlgorithmConfig.model_validate(config["algorithm"]).updates_per_step
    learner = LearnerConfig.model_validate(config["learner"])
    steps = RunConfig.model_validate(config["run"]).steps
    return lr_at(step * updates + 1, learner, steps * updates)


def _unequal(saved: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name, saved and current digest of what differs; nothing is known where one side is empty."""
    for name in dict.fromkeys([*saved, *now]) if saved and now else ():
        if saved.get(name) != now.get(name):
            yield name, saved.get(name, NONE), now.get(name, NONE)


def _short(text: str, longest: int = SHOWN) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
