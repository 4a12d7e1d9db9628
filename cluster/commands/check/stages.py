"""What a check prints: stages that follow each other, each with its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cohort.actors.errors import CohortError

INDENT = "    "
# Of an error's text; a traceback's last lines matter most.
LONGEST_MESSAGE = 3000


class Stage:
    """One part of a check. `say` prints at once; a problem means that the run could not work."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.warnings: list[str] = []
        self.problems: list[str] = []

    def say(self, text: str = "") -> None:
        for line in text.split("\n"):
            self._say(f"{INDENT}{line}".rstrip())

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.say(f"warning: {text}")

    def problem(self, text: str) -> None:
        short = text if len(text) <= LONGEST_MESSAGE else f"...{text[-LONGEST_MESSAGE:]}"
        self.problems.append(short)
        self.say(f"PROBLEM: {short}")


class CheckReport:
    """All stages so far; `print_line` takes each line as soon as there is one."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print = print_line
        self.warnings: list[str] = []
        self.problems: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage of the check; a CohortError becomes its problem and ends only this stage."""
        self._print(name)
        stage = Stage(self._print)
        began = time.monotonic()
        try:
            yield stage
        except CohortError as error:
            stage.problem(str(error))
        result = "PROBLEM" if stage.problems else "warning" if stage.warnings else "ok"
        stage.say(f"[{result}] {time.monotonic() - began:.1f} s")
        self.warnings += [f"{name}: {text}" for text in stage.warnings]
        self.problems += [f"{name}: {text}" for text in stage.problems]

    def conclude(self) -> int:
        """Print what was found once more, the worst last; the exit code: 1 with problems."""
        self._print("")
        for kind, found in (("warning", self.warnings), ("PROBLEM", self.problems)):
            for text in found:
                # The first line says what it is; the rest stands above.
                self._print(f"{kind}  {text.splitlines()[0]}")
        if self.problems:
            self._print(f"This run could not work: {_count(self.problems, 'problem')}.")
            return 1
        also = f", with {_count(self.warnings, 'warning')}" if self.warnings else ""
        self._print(f"This run can start{also}.")
        return 0


def _count(found: list[str], noun: str) -> str:
    return f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"
