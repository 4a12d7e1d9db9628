"""What differs between a run that is resumed and the one that was saved, and what that breaks.

A difference is refused unless it is known to leave rows, schedule and objective as they are, or
`run.allow_changed` names its key. Pure functions on two fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohort.cluster.config import SECTIONS
from cohort.learner.config import LearnerConfig
from cohort.learner.optimizer import lr_at

# What is trained, and how, stays the same whatever these are. The checkpoint's own shape
# (learner.workers, learner.zero_stage, model.dtype) is compared where it is loaded.
HARMLESS_SECTIONS = ("cluster", "tracking")
# Where and how the run is resumed is nothing that it is made of.
NOT_COMPARED = ("run.dir", "run.resume", "run.allow_changed")
HARMLESS = frozenset(
    [
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "task.solved_at",
        "task.eval_prompts",
        "actors.count",
        "actors.max_staleness",
        "actors.max_concurrent",
        "actors.kv_cache_gib",
        "actors.gpu_memory",
        "actors.tensor_parallel",
        "actors.compile",
        "actors.quantization",
        "actors.start_timeout_s",
        "actors.group_timeout_s",
        "actors.sync_timeout_s",
        "actors.probe_tolerance",
        "rewards.workers",
        "rewards.timeout_s",
        "rewards.memory_gb",
        "rewards.max_error_rate",
        "learner.workers",
        "learner.zero_stage",
        "model.dtype",
        "learner.micro_batch_tokens",
        "learner.logit_chunk_tokens",
        "learner.gradient_checkpointing",
        "learner.offload",
        "learner.deepspeed",
        "learner.float8",
        "learner.attention",
        "learner.max_skipped_steps",
        "learner.step_timeout_s",
        # The keys that it sets are compared.
        "algorithm.preset",
    ]
)
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
# What the learning rate of an update follows from.
RATE_KEYS = (
    "run.steps",
    "learner.learning_rate",
    "learner.warmup_steps",
    "learner.lr_schedule",
    "learner.lr_final",
)
SHOWN = 48


@dataclass(frozen=True)
class Difference:
    """key: the config key that stands for it. what: more than the key where that is not all.

    breaks: what it would break; empty when nothing.
    """

    key: str
    saved: str
    now: str
    breaks: str = ""
    what: str = ""

    @property
    def name(self) -> str:
        return f"{self.key} ({self.what})" if self.what else self.key


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[Difference]:
    """Everything that differs between two fingerprints. step: the steps that were saved."""
    rows = list(_content(saved["rows"], now["rows"], _rows_key(now["config"]), "rows"))
    model = list(_content(saved["model"], now["model"], "model.path", "file"))
    same = set()
    if not rows:
        # The same rows from another place.
        same |= {"task.data", "task.eval_data"}
    if saved["model"] and not model:
        same.add("model.path")
    found = [
        _config_difference(key, before, after, saved["config"], now["config"], step, same)
        for key, before, after in _changed(saved["config"], now["config"])
    ]
    code = [
        Difference(name.partition(":")[0], before, after, what=name.partition(": ")[2])
        for name, before, after in _unequal(saved["code"], now["code"])
        # One that is there only once is in the config's difference.
        if before and after
    ]
    return found + rows + model + code


def split_allowed(
    found: Sequence[Difference], allowed: Sequence[str]
) -> tuple[list[Difference], list[Difference]]:
    """(what must be refused, what may be)."""
    refused = [item for item in found if item.breaks and item.key not in allowed]
    return refused, [item for item in found if item not in refused]


def table(found: Sequence[Difference]) -> str:
    """Key, saved and current value, and what the change breaks, in columns."""
    rows = [("key", "saved", "now", "")]
    rows += [
        (item.name, _short(item.saved), _short(item.now), _short(item.breaks, 80)) for item in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def refusal(refused: Sequence[Difference], folder: object, step: int) -> str:
    """The message of a run that is not resumed."""
    keys = ",".join(dict.fromkeys(item.key for item in refused))
    return (
        f"run.dir={folder}: not resumed, because this run differs from the one that was saved "
        f"after step {step}:\n{table(refused)}\nSet these back, or choose another run.dir for a "
        f"new run. To go on with the changes all the same: 'run.allow_changed=[{keys}]'"
    )


def accepted(found: Sequence[Difference]) -> str:
    """What to say of differences with which the run goes on; empty when there are none."""
    if not found:
        return ""
    return f"changed since the checkpoint:\n{table(found)}"


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, saved and current value of every config key that differs."""
    for section, values in now.items():
        before = saved.get(section, {})
        fields = SECTIONS[section].model_fields
        for name, value in values.items():
            # A key that this release has added had its default's effect.
            default = fields[name].get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            known = before.get(name, default)
            if known != value and f"{section}.{name}" not in NOT_COMPARED:
                yield f"{section}.{name}", known, value


def _config_difference(
    key: str,
    before: Any,
    after: Any,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    step: int,
    same: set[str],
) -> Difference:
    section = key.partition(".")[0]
    breaks = BREAKS.get(key) or BREAKS.get(section, "not known to be harmless")
    if key in HARMLESS or section in HARMLESS_SECTIONS or key in same:
        breaks = ""
    if key in RATE_KEYS:
        rates = _next_rate(saved, step), _next_rate(_with(saved, key, after), step)
        if rates[0] != rates[1]:
            breaks = f"the learning rate would jump from {rates[0]:.3g} to {rates[1]:.3g}"
        elif key == "run.steps" and not (_ends_with_run(saved) or _ends_with_run(now)):
            breaks = ""
    return Difference(key, str(before), str(after), breaks)


def _with(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with one key changed."""
    section, _, name = key.partition(".")
    return {**config, section: {**config[section], name: value}}


def _ends_with_run(config: Mapping[str, Any]) -> bool:
    return config["learner"]["lr_schedule"] != "constant"


def _next_rate(config: Mapping[str, Any], step: int) -> float:
    """Learning rate of the first update after the checkpoint."""
    updates = config["algorithm"]["updates_per_step"]
    learner = LearnerConfig.model_validate(config["learner"])
    return lr_at(step * updates + 1, learner, config["run"]["steps"] * updates)


def _content(
    saved: Mapping[str, str], now: Mapping[str, str], key: str, what: str
) -> Iterator[Difference]:
    """Differences of what a key stands for. Nothing is known where one side has nothing."""
    if not saved or not now:
        return
    for name, before, after in _unequal(saved, now):
        yield Difference(
            key,
            before or "none",
            after or "none",
            BREAKS.get(key, BREAKS["task"]),
            f"{name} {what}" if what == "rows" else name,
        )


def _rows_key(config: Mapping[str, Any]) -> str:
    return "task.data" if config["task"]["data"] else "task.name"


def _unequal(
    saved: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[tuple[str, str | None, str | None]]:
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            yield name, saved.get(name), now.get(name)


def _short(text: str, longest: int = SHOWN) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
