"""Looks at processes from outside of them, on the node where they run: /proc does not lie.

A process that hangs cannot tell so itself. A rollout actor looks at its engine's processes; at the
actors, and at other workers, the driver looks: directly on its own node, elsewhere through a
`Witness`, a Ray actor without resources of which every node has one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cohort.actors.process import running_ray
from cohort.actors.records import Place
from cohort.actors.watch import Look

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PROC = Path("/proc")
# A witness on a node in trouble must not hold up the driver.
ANSWER_S = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


def look_at(pids: Sequence[int], proc: Path = PROC) -> Look | None:
    """A look at these processes of this machine; None when none of them is there (any more).

    Args:
        pids: Processes, not threads. Those that are gone are left out.
        proc: Where the kernel shows them.
    """
    found: list[int] = []
    cpu_s, stopped, awake = 0.0, False, False
    for pid in pids:
        try:
            state, seconds = _stat(proc / str(pid) / "stat")
            threads = [_stat(task / "stat")[0] for task in (proc / str(pid) / "task").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended, or one of its threads did just now: the next look tells
        if state in "ZX":
            continue
        found.append(pid)
        cpu_s += seconds
        # T: stopped by a signal, t: by a debugger.
        stopped = stopped or state in "Tt"
        awake = awake or any(state in "RD" for state in threads)
    return Look(tuple(found), cpu_s, stopped, awake) if found else None


def _stat(file: Path) -> tuple[str, float]:
    """State and seconds of CPU, as proc_pid_stat(5) describes them."""
    # The name in brackets may hold anything, also brackets.
    fields = file.read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), (int(fields[11]) + int(fields[12])) / _TICKS


def node_id() -> str:
    """The Ray node of this process; `local` without Ray."""
    ray = running_ray()
    return "local" if ray is None else str(ray.get_runtime_context().get_node_id())


class Witness:
    """Looks at processes of the node that it runs on. To be wrapped by `ray.remote`."""

    kind = "witness"

    def look(self, pid: int) -> Look | None:
        return look_at([pid])


class Witnesses:
    """What the driver sees of processes on any node."""

    def __init__(self) -> None:
        self._actors: dict[str, ActorHandle[Witness]] = {}

    def meet(self, places: Iterable[Place]) -> None:
        """Have a witness on every node that some of these places are on, and the driver is not."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in {place.node_id for place in places} - {node_id(), *self._actors}:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            actor = ray.remote(Witness).options(num_cpus=0, scheduling_strategy=here).remote()
            # Ray's type is a union with the class, for editors.
            self._actors[node] = cast("ActorHandle[Witness]", actor)

    async def look(self, place: Place) -> Look | None:
        """A look at the process of a place; None when nobody can see it."""
        if place.node_id == node_id():
            return look_at([place.pid])
        witness = self._actors.get(place.node_id)
        if witness is None:
            return None
        answer: asyncio.Future[Look | None]
        answer = asyncio.ensure_future(witness.look.remote(place.pid))
        try:
            await asyncio.wait({answer}, timeout=ANSWER_S)
            # One that died with its node: the node's actors are dead as well, which Ray reports.
            return answer.result() if answer.done() and not answer.exception() else None
        finally:
            answer.cancel()

    def kill(self) -> None:
        """End the witnesses."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
