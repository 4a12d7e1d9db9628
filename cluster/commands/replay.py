"""`cohort replay`: train a run's steps again from its journal, and compare the weights.

No engine is started: the groups are those that the journal holds. The learner is the run's own,
with its ranks and threads, for sums in another order are other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cohort.actors.records import ScoredRef
from cohort.cluster.config_file import load_config
from cohort.cluster.errors import RunError
from cohort.cluster.journal.history import History, read_history
from cohort.cluster.journal.opening import JOURNAL
from cohort.cluster.journal.records import StepRecord
from cohort.cluster.journal.segments import read_group
from cohort.cluster.launch import launch
from cohort.cluster.observe.console import Console
from cohort.cluster.prepare import passing_logs, prepare
from cohort.cluster.ray_start import check_start
from cohort.learner.checkpoint import complete_steps
from cohort.learner.learner import Learner


@dataclass(frozen=True)
class Range:
    """The steps to compare, the last one not included. None: as far as they are there."""

    first: int | None = None
    end: int | None = None

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read A:B, A: or :B.

        Raises:
            RunError: It has another form.

        Example:
            >>> Range.parse("3:5")
            Range(first=3, end=5)
        """
        first, colon, end = text.partition(":")
        numbers = [part for part in (first, end) if part]
        if not colon or not all(part.isdecimal() for part in numbers):
            raise RunError(f"--steps {text}: write A:B, as 10:20 for the steps 10 to 19")
        found = cls(int(first) if first else None, int(end) if end else None)
        if found.first is not None and found.end is not None and found.first >= found.end:
            raise RunError(f"--steps {text} names no step")
        return found


@dataclass(frozen=True)
class Plan:
    """What is replayed.

    Attributes:
        start: Steps that are done in the checkpoint that it begins with; 0: the model folder.
        first, end: The steps that are compared, without `end`.
    """

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Compared:
    """A step's fingerprints.

    Attributes:
        recorded: The one in the journal; None: the run ended before.
        replayed: This learner's.
    """

    step: int
    groups: int
    recorded: str | None
    replayed: str

    @property
    def outcome(self) -> str:
        if self.recorded is None:
            return "not recorded"
        return "equal" if self.recorded == self.replayed else "DIFFERENT"


def plan_replay(history: History, checkpoints: Sequence[int], asked: Range) -> Plan:
    """Where to begin and which steps to compare. Pure.

    Args:
        history: What the journal holds.
        checkpoints: Steps of the complete checkpoints.
        asked: The steps that were asked for.

    Raises:
        RunError: The journal does not hold every step from a checkpoint on.
    """
    if not history.steps:
        raise RunError("the journal holds no step that was trained")
    starts = [start for start in sorted({0, *checkpoints}) if start in history.steps]
    there = spans(history.steps)
    last = max(history.steps) + 1
    end = last if asked.end is None else asked.end
    if asked.first is not None:
        starts = [start for start in starts if start <= asked.first][-1:]
    if not starts:
        raise RunError(
            f"no checkpoint is left from which the steps can be replayed: there are checkpoints of "
            f"{', '.join(map(str, checkpoints)) or 'no'} steps, and the journal holds the steps "
            f"{there} (run.keep_checkpoints, run.journal_gb and run.keep_journal say how much of "
            "the past is kept)"
        )
    start = starts[0]
    first = start if asked.first is None else asked.first
    missing = [step for step in range(start, end) if step not in history.steps]
    if missing and (asked.end is not None or asked.first is not None):
        raise RunError(f"the journal does not hold step {missing[0]}: it holds the steps {there}")
    if missing:
        end = missing[0]
    if first >= end:
        raise RunError(f"there is no step {first}: the journal holds the steps {there}")
    return Plan(start, first, end)


def spans(steps: Iterable[int]) -> str:
    """Numbers in words.

    Example:
        >>> spans([4, 2, 3, 7])
        '2 to 4, 7'
    """
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


async def run_replay(
    run_dir: Path, asked: Range, console: Console, show: Callable[[str], None]
) -> int:
    """Replay a run's steps and print a table.

    Returns:
        The exit code: 0 when every fingerprint that was recorded is that of the replay, else 1.

    Raises:
        CohortError: The run cannot be replayed; the message says why.
    """
    config = load_config(run_dir / "config.yaml", [])
    history = read_history(run_dir / JOURNAL)
    found = plan_replay(history, complete_steps(run_dir / "checkpoints"), asked)
    prepared = prepare(config)
    check_start(config)
    # Sums over another number of threads have other bits.
    threads = history.head.threads if history.head else None
    rows: list[Compared] = []
    with passing_logs("replay") as log_dir:
        async with launch(
            prepared, console, log_dir, ["learner"], learner_threads=threads
        ) as actors:
            if found.start:
                console.stage(f"loading checkpoint {found.start}")
                await actors.learner.load(run_dir / "checkpoints" / f"step-{found.start}")
            for step in range(found.start, found.end):
                console.stage(f"replaying step {step}")
                row = await _step(actors.learner, history, run_dir / JOURNAL, step)
                if step >= found.first:
                    rows.append(row)
    for line in table(rows):
        show(line)
    return int(any(row.outcome == "DIFFERENT" for row in rows))


async def _step(learner: Learner, history: History, folder: Path, step: int) -> Compared:
    """Train a step again."""
    groups = load_step(history.steps[step], folder)
    await learner.step(groups)
    info = await learner.publish()
    recorded = history.weights.get(step)
    return Compared(
        step, len(groups), None if recorded is None else recorded.fingerprint, info.fingerprint
    )


def load_step(record: StepRecord, folder: Path) -> list[ScoredRef]:
    """The groups that a step has trained, in their order, in Ray's object store."""
    import ray

    groups = []
    for _, place in record.groups:
        found = read_group(folder, place)
        groups.append(ScoredRef(found.meta, found.scores, ray.put(found.scored)))
    return groups


def table(rows: Sequence[Compared]) -> list[str]:
    """The lines of the table, and one that sums it up."""
    lines = [f"{'step':>6}  {'groups':>6}  {'recorded':<16}  {'replayed':<16}"]
    for row in rows:
        recorded = (row.recorded or "-")[:16]
        lines.append(
            f"{row.step:>6}  {row.groups:>6}  {recorded:<16}  {row.replayed[:16]:<16}  "
            f"{row.outcome}"
        )
    outcomes = [row.outcome for row in rows]
    return [
        *lines,
        f"{len(rows)} steps: {outcomes.count('equal')} equal, {outcomes.count('DIFFERENT')} "
        f"different, {outcomes.count('not recorded')} not recorded",
    ]
