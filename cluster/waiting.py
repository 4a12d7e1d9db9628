"""Says what a run waits for when a step takes unusually long, and shows stacks on request.

Each wait has a deadline of its own; this tells before it comes.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# The first notice about a step comes after so long; each later one when it has taken twice as long.
SLOW_S = 120.0
SHOWN = 5
STACKS = signal.SIGUSR1


@dataclass(frozen=True)
class Pending:
    """What a step still waits for.

    Attributes:
        where: What happens to these now.
        names: Of groups.
    """

    where: str
    names: Sequence[str]

    def __str__(self) -> str:
        more = f" and {len(self.names) - SHOWN} more" if len(self.names) > SHOWN else ""
        return f"{self.where} {', '.join(self.names[:SHOWN])}{more}"


def pending_groups(tasks: Mapping[str, asyncio.Future[T]], scoring: set[str]) -> list[Pending]:
    """Those of a step's groups that are not done.

    Args:
        tasks: Of each group by its id.
        scoring: Groups that have all completions.
    """
    left = {group for group, task in tasks.items() if not task.done()}
    found = [
        Pending("scores of", sorted(left & scoring)),
        Pending("completions of", sorted(left - scoring)),
    ]
    return [pending for pending in found if pending.names]


def stacks_on_request() -> None:
    """Have SIGUSR1 write the stacks of all threads to stderr, also from within native code."""
    faulthandler.register(STACKS, file=2, all_threads=True)


async def tell_when_slow(
    step: Callable[[], int], pending: Callable[[], Sequence[Pending]], tell: Callable[[str], None]
) -> None:
    """Look at a run until cancelled, and tell what a slow step waits for.

    Args:
        step: The number of the step in work.
        pending: What it waits for now; nothing while the learner or the weights are at work.
        tell: Shows a line.
    """
    while True:
        watched, waited_s, pause_s = step(), 0.0, SLOW_S
        while True:
            await asyncio.sleep(pause_s)
            if step() != watched:
                break
            waited_s += pause_s
            what = "; ".join(map(str, pending())) or "the learner, or the engines' new weights"
            tell(f"step {watched}: {waited_s:.0f} s without an end; waiting for {what}")
            pause_s = waited_s
