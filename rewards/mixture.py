"""Several tasks in one run: by weight, or led by how often each is solved."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cohort.actors.records import derive_seed
from cohort.rewards.base import resolve_path, reward_path
from cohort.rewards.config import RewardFunctionConfig, TaskConfig
from cohort.rewards.rates import PassRates
from cohort.rewards.survey import Survey, survey_of
from cohort.rewards.tasks import (
    Curriculum,
    Demonstrates,
    Fingerprinted,
    Measures,
    Row,
    Task,
    TaskError,
    load_task,
    row_order,
)

# Positions over which every part has exactly its fraction, spread evenly.
BLOCK = 1000
# A curriculum keeps the weight of parts that are solved this often, and cuts that of others: a
# group whose completions are all right or all wrong has nothing to teach.
BAND = (0.1, 0.8)
OUTSIDE = 0.25


class PartConfig(BaseModel):
    """One entry of `task.options.tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str | None = None
    data: str | None = None
    eval_data: str | None = None
    options: dict[str, object] = Field(default_factory=dict)
    functions: list[RewardFunctionConfig | str] | None = Field(None, min_length=1)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class _Part:
    label: str
    task: Task
    weight: float
    functions: tuple[RewardFunctionConfig, ...]


class MixtureTask:
    """Rows of several tasks.

    Every part goes through its rows epoch by epoch in an order of its own. With `curriculum`, a
    part of whose recent completions less than 10 % or more than 80 % are solved gets a quarter of
    its weight; what a part gives at a position is then the row that it would give if it were alone,
    so an epoch of it may leave rows out, but has none twice.

    Args:
        seed: The run's.
        tasks: Of {name, data, eval_data, options} as in the section `task`, each with a weight (1);
            a label (the name), which starts the ids of its rows and is their source; and functions,
            as rewards.functions, in place of the task's own. A part's functions score its rows
            only.
        curriculum: See above.

    Raises:
        TaskError: An option is wrong, or a part cannot be loaded.
    """

    def __init__(self, seed: int, tasks: Sequence[object], curriculum: bool = False) -> None:
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
            raise TaskError("task.options.tasks must be a list of at least one task")
        if not isinstance(curriculum, bool):
            raise TaskError(f"task.options.curriculum must be true or false, got {curriculum!r}")
        self._parts = [_load_part(entry, number, seed) for number, entry in enumerate(tasks)]
        labels = [part.label for part in self._parts]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise TaskError(
                    f"task.options.tasks[{number}]: another part is called {label} too; give one "
                    "of them a label"
                )
        self._curriculum = curriculum
        self._shares = shares([part.weight for part in self._parts])
        if curriculum:
            # Weights that get too small are found here, not in the middle of a run.
            for cut in self._parts:
                shares([p.weight * (OUTSIDE if p is cut else 1.0) for p in self._parts])
        self._eval = self._eval_order()

    @property
    def rewards(self) -> tuple[RewardFunctionConfig, ...]:
        """Every part's functions, each for its own sources; none when a part has none."""
        if not all(part.functions for part in self._parts):
            return ()
        sources: dict[str, list[str]] = {}
        found: dict[str, RewardFunctionConfig] = {}
        for part in self._parts:
            for function in part.functions:
                # A short name and its path are the same function.
                path = resolve_path(reward_path(function.path), Path.cwd())
                key = function.model_copy(update={"path": path}).model_dump_json()
                found[key] = function
                sources.setdefault(key, []).append(part.label)
        return tuple(
            function.model_copy(update={"sources": sources[key]}) for key, function in found.items()
        )

    def train_size(self) -> int:
        return sum(part.task.train_size() for part in self._parts)

    def train_row(self, index: int) -> Row:
        """Row `index` of all parts' rows, one part after the other."""
        for part in self._parts:
            if 0 <= index < part.task.train_size():
                return _labelled(part, part.task.train_row(index))
            index -= part.task.train_size()
        raise IndexError(f"there are {self.train_size()} rows")

    def fingerprint(self) -> dict[str, str]:
        """Of the parts that have one, under their labels."""
        return {
            f"{part.label}/{name}": digest
            for part in self._parts
            if isinstance(part.task, Fingerprinted)
            for name, digest in part.task.fingerprint().items()
        }

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        """Row `index` of the held-out rows: parts take turns by weight, until each is used up."""
        number, at = self._eval[index]
        part = self._parts[number]
        return _labelled(part, part.task.eval_row(at))

    def choose(self, seed: int, cursor: int, rates: PassRates) -> tuple[int, Row]:
        """See `cohort.rewards.tasks.Curriculum`. The epoch is the part's own."""
        block, offset = divmod(cursor, BLOCK)
        counts = shares(self._weights(rates)) if self._curriculum else self._shares
        number, nth = block_order(counts, derive_seed(seed, "mixture", block))[offset]
        part = self._parts[number]
        position = cursor if self._curriculum else block * counts[number] + nth
        size = part.task.train_size()
        epoch, at = divmod(position, size)
        order = row_order(derive_seed(seed, "mixture", part.label), epoch, size)
        return epoch, _labelled(part, part.task.train_row(order[at]))

    def survey(self) -> Survey:
        """See `cohort.rewards.survey.Surveys`."""
        parts = [survey_of(part.task) for part in self._parts]
        numbers, places = np.array(self._eval, dtype=np.int64).T
        held_out = np.empty(len(self._eval), dtype=np.int64)
        for number, part in enumerate(parts):
            held_out[numbers == number] = part.eval_bytes[places[numbers == number]]
        labels = frozenset(part.label for part in self._parts)
        return Survey(np.concatenate([part.train_bytes for part in parts]), held_out, labels)

    def demonstration(self, row: Row, epoch: int) -> str | list[str] | None:
        """The demonstration of the row's own task, if it has one."""
        [part] = [part for part in self._parts if part.label == row.source]
        if not isinstance(part.task, Demonstrates):
            return None
        return part.task.demonstration(_unlabelled(part, row), epoch)

    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """The metrics of each part that has some, as `label/name`."""
        found: dict[str, float] = {}
        for part in self._parts:
            pairs = [
                (_unlabelled(part, row), text)
                for row, text in zip(rows, completions, strict=True)
                if row.source == part.label
            ]
            if pairs and isinstance(part.task, Measures):
                own = part.task.metrics([row for row, _ in pairs], [text for _, text in pairs])
                found.update({f"{part.label}/{name}": value for name, value in own.items()})
        return found

    def _weights(self, rates: PassRates) -> list[float]:
        weights = []
        for part in self._parts:
            rate = rates.sources.get(part.label)
            inside = rate is None or BAND[0] <= rate.recent <= BAND[1]
            weights.append(part.weight * (1.0 if inside else OUTSIDE))
        return weights

    def _eval_order(self) -> list[tuple[int, int]]:
        turns = [
            ((at + 0.5) / part.weight, number, at)
            for number, part in enumerate(self._parts)
            for at in range(part.task.eval_size())
        ]
        return [(number, at) for _, number, at in sorted(turns)]


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of BLOCK positions each weight gets: its fraction, rounded so that they add up.

    Raises:
        TaskError: A weight is less than a thousandth of all.
    """
    total = sum(weights)
    exact = [BLOCK * weight / total for weight in weights]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for number in by_rest[: BLOCK - sum(counts)]:
        counts[number] += 1
    if 0 in counts:
        raise TaskError(
            f"task.options.tasks[{counts.index(0)}].weight is less than a thousandth of all weights"
        )
    return tuple(counts)


@lru_cache(maxsize=64)
def block_order(counts: tuple[int, ...], seed: int) -> tuple[tuple[int, int], ...]:
    """The parts in a block, evenly spread.

    Args:
        counts: Positions of each part.
        seed: Moves the parts against each other.

    Returns:
        (part, how many of that part came before) for each position.
    """
    rng = random.Random(seed)
    turns = []
    for number, count in enumerate(counts):
        start = rng.random()
        turns += [((nth + start) / count, number, nth) for nth in range(count)]
    return tuple((number, nth) for _, number, nth in sorted(turns))


def _load_part(entry: object, number: int, seed: int) -> _Part:
    where = f"task.options.tasks[{number}]"
    try:
        config = PartConfig.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise TaskError(f"{where}{'.' if key else ''}{key}: {first['msg']}") from error
    label = config.label or config.name.rpartition(":")[2]
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", label):
        raise TaskError(f"{where}.label={label!r}: use letters, digits, '_', '.' and '-'")
    try:
        fields = {"name", "data", "eval_data", "options"}
        task = load_task(TaskConfig(**config.model_dump(include=fields)), seed)
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from error
    if isinstance(task, Curriculum):
        raise TaskError(f"{where}: {config.name} chooses its rows itself and cannot be a part")
    chosen = task.rewards if config.functions is None else config.functions
    functions = tuple(
        RewardFunctionConfig(path=item, weight=1.0) if isinstance(item, str) else item
        for item in chosen
    )
    if any(function.sources for function in functions):
        raise TaskError(f"{where}.functions: leave out sources: they score only this part's rows")
    return _Part(label, task, config.weight, functions)


def _labelled(part: _Part, row: Row) -> Row:
    return Row(f"{part.label}/{row.id}", row.content, row.columns, part.label)


def _unlabelled(part: _Part, row: Row) -> Row:
    return Row(row.id.removeprefix(f"{part.label}/"), row.content, row.columns)
