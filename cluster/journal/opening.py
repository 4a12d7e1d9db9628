"""The journal of a run that starts: what it finds in the folder, and whether that still counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from cohort.cluster.config import Config
from cohort.cluster.continuing import differences, refused
from cohort.cluster.errors import RunError
from cohort.cluster.fingerprint import Fingerprint
from cohort.cluster.journal.actor import Limits
from cohort.cluster.journal.history import History, recover
from cohort.cluster.journal.journal import Journal
from cohort.cluster.journal.records import Head
from cohort.cluster.journal.segments import JournalError, numbers, segment_file
from cohort.cluster.observe.console import Console
from cohort.cluster.run_dir import RunDir

# The journal's folder in the run directory.
JOURNAL = "journal"


def open_journal(
    config: Config,
    run_dir: RunDir,
    first_step: int,
    now: Fingerprint,
    threads: int,
    console: Console,
) -> Journal:
    """The journal of a run that goes on with `first_step`.

    What the folder holds of a run that this one does not go on from is moved aside.

    Args:
        config: The run's config.
        run_dir: Its folder.
        first_step: Steps that are done.
        now: The run's fingerprint, which its segments will name.
        threads: Of each rank of its learner.
        console: Shows what becomes of the past.

    Raises:
        RunError: A record in the middle of the journal is damaged.
    """
    folder = run_dir.path / JOURNAL
    try:
        past, said = recover(folder)
    except JournalError as error:
        raise RunError(str(error)) from error
    for line in said:
        console.note(line)
    if past.is_empty:
        _remove(folder)
    elif why := _another(config, past, first_step, now):
        run_dir.aside.move(folder)
        console.note(f"journal/ is kept aside, and groups are generated again: {why}")
        past = History()
    limits = Limits(int(config.run.journal_gb * 2**30), config.run.keep_journal)
    head = Head(cast("dict[str, JsonValue]", now), threads)
    journal = Journal(folder, head, limits, past, first_step, console.note)
    if journal.ahead:
        console.note(
            f"journal/ has {journal.ahead} groups of steps {first_step} and later, which are not "
            "generated again"
        )
    return journal


def _another(config: Config, past: History, step: int, now: Fingerprint) -> str:
    """Why this run cannot go on with the journal; empty when it can."""
    if not config.run.resume:
        return "it is from a start that recorded nothing else, and run.resume is not set"
    if past.head is None:
        return "it does not say which run it belongs to"
    before = cast(Fingerprint, past.head.run)
    changed = refused(differences(before, now, step), ())
    if changed:
        return f"{', '.join(dict.fromkeys(item.key for item in changed))} changed since"
    if _staleness(before["config"]) > config.actors.max_staleness:
        return "actors.max_staleness is smaller than it was"
    if not past.goes_on_from(step):
        return f"it does not hold every step after step {step}"
    return ""


def _staleness(config: Mapping[str, Mapping[str, JsonValue]]) -> int:
    value = config["actors"]["max_staleness"]
    return value if isinstance(value, int) else 0


def _remove(folder: Path) -> None:
    """Remove segments that hold no group."""
    for number in numbers(folder):
        segment_file(folder, number).unlink()
