"""Pass rates: how often the rows of a task were solved, as a curriculum may see them.

What a curriculum sees is a function of the run's history alone, whatever the timing: the prompts of
step s are chosen from the outcomes of all steps before s - actors.max_staleness, and of none later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cohort.actors.plain import JsonObject

# Weight of the newest group in `Rate.recent`: it forgets what is older than some ten groups.
NEWEST = 0.1


@dataclass(frozen=True)
class PromptOutcome:
    """What became of one group.

    Attributes:
        row_id: Of its prompt's row.
        source: Of that row.
        scored: Completions with a total reward.
        solved: Those of them that reached task.solved_at.
        reward: The mean of their totals; None without any.
    """

    row_id: str
    source: str | None
    scored: int
    solved: int
    reward: float | None


def outcome(
    row_id: str, source: str | None, totals: Sequence[float | None], solved_at: float
) -> PromptOutcome:
    """The outcome of a group.

    Args:
        row_id: Of its prompt's row.
        source: Of that row.
        totals: The total rewards of its completions.
        solved_at: The total from which a completion is solved.
    """
    valid = [total for total in totals if total is not None]
    solved = sum(total >= solved_at for total in valid)
    reward = sum(valid) / len(valid) if valid else None
    return PromptOutcome(row_id, source, len(valid), solved, reward)


@dataclass(frozen=True)
class Rate:
    """How often a row, or the rows of a source, were solved.

    Attributes:
        scored: Completions with a total reward, in the whole run.
        solved: Those of them that were solved.
        recent: A moving mean, over groups, of the fraction that was solved.
    """

    scored: int
    solved: int
    recent: float


@dataclass(frozen=True)
class PassRates:
    """By row id and by source; rows without a scored completion are not there."""

    rows: Mapping[str, Rate] = field(default_factory=dict)
    sources: Mapping[str, Rate] = field(default_factory=dict)


NO_RATES = PassRates()


@dataclass(frozen=True)
class _Before:
    """A history before a step was recorded: its last steps, and the rates that the step changed."""

    step: int
    last: list[tuple[int, tuple[PromptOutcome, ...]]]
    rows: Mapping[str, Rate | None]
    sources: Mapping[str, Rate | None]


class RateHistory:
    """The outcomes of a run so far, and which of them the prompts of a step may depend on.

    Steps are recorded in order. The last `delay` steps are kept one by one: a resumed run chooses
    again the prompts of steps that were in flight, from the same outcomes as the first time.

    Args:
        delay: actors.max_staleness.
    """

    def __init__(self, delay: int) -> None:
        self._delay = delay
        self._rows: dict[str, Rate] = {}
        self._sources: dict[str, Rate] = {}
        self._last: list[tuple[int, tuple[PromptOutcome, ...]]] = []
        # What it was before the newest step, as far as that changed it.
        self._before: _Before | None = None

    def record(self, step: int, outcomes: Sequence[PromptOutcome]) -> None:
        """Add the outcomes of a finished step."""
        merged = [o for s, old in self._last if s <= step - self._delay for o in old]
        merged += outcomes if self._delay == 0 else []
        self._before = _Before(
            step,
            list(self._last),
            {o.row_id: self._rows.get(o.row_id) for o in merged},
            {o.source: self._sources.get(o.source) for o in merged if o.source is not None},
        )
        self._last.append((step, tuple(outcomes)))
        while self._last and self._last[0][0] <= step - self._delay:
            _, old = self._last.pop(0)
            _add(self._rows, self._sources, old)

    def before(self, step: int) -> PassRates:
        """What the prompts of `step` are chosen from. A copy: later outcomes do not change it."""
        rows, sources = dict(self._rows), dict(self._sources)
        for recorded, outcomes in self._last:
            if recorded < step - self._delay:
                _add(rows, sources, outcomes)
        return PassRates(rows, sources)

    def as_dict(self, before: int | None = None) -> JsonObject:
        """What a checkpoint keeps, as JSON holds it.

        Args:
            before: Leave out the newest step if it is this one or a later one, as when a run ends
                between the recording of a step's outcomes and the end of the step.
        """
        rows: Mapping[str, Rate | None] = self._rows
        sources: Mapping[str, Rate | None] = self._sources
        last = self._last
        if before is not None and self._before is not None and self._before.step >= before:
            last = self._before.last
            rows = {**rows, **self._before.rows}
            sources = {**sources, **self._before.sources}
        return {
            "rows": {name: _listed(rate) for name, rate in rows.items() if rate},
            "sources": {name: _listed(rate) for name, rate in sources.items() if rate},
            "last": [
                [step, [[o.row_id, o.source, o.scored, o.solved, o.reward] for o in outcomes]]
                for step, outcomes in last
            ],
        }

    @classmethod
    def resumed(cls, saved: JsonObject, delay: int) -> RateHistory:
        """A history that goes on from a checkpoint.

        Args:
            saved: What `as_dict` gave.
            delay: actors.max_staleness.
        """
        history = cls(delay)
        history._rows = {name: Rate(*values) for name, values in saved["rows"].items()}
        history._sources = {name: Rate(*values) for name, values in saved["sources"].items()}
        history._last = [
            (step, tuple(PromptOutcome(*values) for values in outcomes))
            for step, outcomes in saved["last"]
        ]
        return history


def _listed(rate: Rate) -> list[float]:
    return [rate.scored, rate.solved, rate.recent]


def _add(
    rows: dict[str, Rate], sources: dict[str, Rate], outcomes: Sequence[PromptOutcome]
) -> None:
    for item in outcomes:
        if item.scored:
            rows[item.row_id] = _after(rows.get(item.row_id), item)
            if item.source is not None:
                sources[item.source] = _after(sources.get(item.source), item)


def _after(rate: Rate | None, item: PromptOutcome) -> Rate:
    fraction = item.solved / item.scored
    if rate is None:
        return Rate(item.scored, item.solved, fraction)
    recent = rate.recent + NEWEST * (fraction - rate.recent)
    return Rate(rate.scored + item.scored, rate.solved + item.solved, recent)
