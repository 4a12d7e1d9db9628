"""The differences between a run that is resumed and the one that was saved, and what they break.

A difference is refused unless it is known to leave rows, schedule and objective as they are, or
`run.allow_changed` names its key. Pure functions on two fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from cohort.cluster.config import SECTIONS, ClusterConfig, RunConfig, TrackingConfig
from cohort.cluster.fingerprint import ConfigTree, Fingerprint
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.optimizer import lr_at

# Keys that change neither what is trained nor how. The checkpoint's own shape (learner.workers,
# learner.zero_stage, model.dtype) is compared where it is loaded.
HARMLESS = {
    "cluster": set(ClusterConfig.model_fields),
    "tracking": set(TrackingConfig.model_fields),
    "run": {"checkpoint_every", "keep_checkpoints"},
    "task": {"solved_at", "eval_prompts"},
    "model": {"dtype"},
    "actors": {
        "count", "max_staleness", "max_concurrent", "kv_cache_gib", "gpu_memory", "tensor_parallel",
        "compile", "quantization", "start_timeout_s", "group_timeout_s", "sync_timeout_s",
        "probe_tolerance",
    },
    "rewards": {"workers", "timeout_s", "memory_gb", "max_error_rate"},
    "learner": {
        "workers", "zero_stage", "micro_batch_tokens", "logit_chunk_tokens", "attention",
        "gradient_checkpointing", "offload", "deepspeed", "float8", "max_skipped_steps",
        "step_timeout_s",
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
    "model": "the same rows become other prompts, or are left out",
    "task.prompts_per_step": "other steps than those that the schedule counts",
    "task.group_size": "advantages of other groups",
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
    model = [
        Difference("model.path", before, after, BREAKS["model.path"], name)
        for name, before, after in _unequal(saved["model"], now["model"])
    ]
    same = set()
    if not rows:
        # The same rows from another place.
        same |= {"task.data", "task.eval_data"}
    if saved["model"] and not model:
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


def split_allowed(
    found: Sequence[Difference], allowed: Sequence[str]
) -> tuple[list[Difference], list[Difference]]:
    """Split differences into (refused, accepted); allowed: the keys of run.allow_changed."""
    refused = [item for item in found if item.breaks and item.key not in allowed]
    return refused, [item for item in found if item not in refused]


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


def refusal(refused: Sequence[Difference], folder: object, step: int) -> str:
    """The message of a run that is not resumed, with the override that would allow it."""
    keys = ",".join(dict.fromkeys(item.key for item in refused))
    return (
        f"run.dir={folder}: not resumed, because this run differs from the one that was saved "
        f"after step {step}:\n{table(refused)}\nSet these back, or choose another run.dir for a "
        f"new run. To go on with the changes all the same: 'run.allow_changed=[{keys}]'"
    )


def accepted(found: Sequence[Difference]) -> str:
    """The message about accepted differences; empty when there are none."""
    return f"changed since the checkpoint:\n{table(found)}" if found else ""


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
