"""Typed calls to all learner ranks at once; the first cause of a failure is told from the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import ray
from ray.exceptions import RayTaskError

from cohort.actors.errors import TRY_AGAIN, CohortError, kind_of, words
from cohort.learner.checkpoint import NotFiniteError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cohort.learner.worker import LearnerWorker

# When one rank fails, the others fail in the collective operation they share with it. Their errors
# are awaited this long, so that the first cause can be told from its consequences.
GRACE_S = 5.0
CONSEQUENCES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class LearnerError(CohortError):
    """The learner cannot go on; the message names the rank, what it did, and its own error.

    Attributes:
        savable: Every rank lives and answers, so that what was learned may still be saved.
        lost: A rank died, is frozen, or is late: the ranks can be started again.
    """

    def __init__(self, message: str, savable: bool = True, lost: bool = False) -> None:
        super().__init__(message)
        self.savable = savable
        self.lost = lost
        # Ranks that are gone can be started again; a mistake of theirs would be made again.
        self.exit_code = CohortError.exit_code if savable else TRY_AGAIN


class Ranks:
    """The actors of all ranks. Every call raises LearnerError on the first failure or timeout.

    Example:
        >>> ranks = Ranks(handles, timeout_s=600)
        >>> await ranks.all("saving a checkpoint", LearnerWorker.save, "runs/a/checkpoints/tmp-20")

    Args:
        handles: One actor per rank, in their order.
        timeout_s: The longest wait for a call.
        watch: Ends with the words for a rank when that rank is frozen; asked during every call.
            None: nobody looks.
    """

    def __init__(
        self,
        handles: Sequence[ActorHandle[LearnerWorker]],
        timeout_s: float,
        watch: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self.handles = list(handles)
        self.timeout_s = timeout_s
        self.watch = watch

    async def all(
        self, what: str, method: Callable[[LearnerWorker, *Ts], R], *arguments: *Ts
    ) -> list[R]:
        """Call a method of every rank with the same arguments; their results, in order.

        Args:
            what: What the ranks do, for messages.
            method: Of LearnerWorker; it is called by its name.
            arguments: Of the method.
        """
        return await self.each(what, method, [arguments] * len(self.handles))

    async def each(
        self, what: str, method: Callable[[LearnerWorker, *Ts], R], arguments: Sequence[tuple[*Ts]]
    ) -> list[R]:
        """Call a method of every rank with arguments of its own; their results, in order."""
        calls = [
            getattr(handle, method.__name__).remote(*given)
            for handle, given in zip(self.handles, arguments, strict=True)
        ]
        return await results_of(what, calls, self.timeout_s, self.watch)

    async def ready(self) -> None:
        """Wait until the processes of all ranks are there."""
        name = "__ray_ready__"
        calls = [getattr(handle, name).remote() for handle in self.handles]
        await results_of("starting the process", calls, self.timeout_s)

    def kill(self) -> None:
        """End all ranks at once."""
        for handle in self.handles:
            ray.kill(handle)


async def results_of(
    what: str,
    calls: Sequence[Awaitable[R]],
    timeout_s: float,
    watch: Callable[[], Awaitable[str]] | None = None,
) -> list[R]:
    """The results of one call per rank, in order.

    Raises:
        LearnerError: On the first failure, when `watch` ends, or after `timeout_s` seconds.
    """
    tasks = [asyncio.ensure_future(_value(call)) for call in calls]
    watching = asyncio.ensure_future(_value(watch() if watch is not None else _never()))
    deadline = asyncio.get_running_loop().time() + timeout_s
    try:
        waiting = set(tasks)
        while waiting and not _errors(tasks):
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(
                {*waiting, watching}, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            waiting -= done
            if not done or (watching in done and waiting and not _errors(tasks)):
                break
        errors = _errors(tasks)
        if errors and waiting:
            _, waiting = await asyncio.wait(waiting, timeout=GRACE_S)
            errors = _errors(tasks)
        if errors:
            rank = min(errors, key=lambda rank: _blame(errors[rank]))
            # It would refuse the same input again; the others only wait for it.
            refused = _blame(errors[rank]) == 1 and kind_of(errors[rank]) == "data"
            raise LearnerError(
                f"learner rank {rank} failed {what}: {message_of(errors[rank])}",
                savable=not waiting and all(map(_is_alive, errors.values())),
                lost=not refused and (bool(waiting) or _blame(errors[rank]) == 0),
            ) from errors[rank]
        if waiting and watching.done():
            raise LearnerError(
                f"learner {watching.result()} during {what}", savable=False, lost=True
            )
        if waiting:
            late = [rank for rank, task in enumerate(tasks) if task in waiting]
            raise LearnerError(
                f"learner rank(s) {late} did not finish {what} within {timeout_s} s;"
                " the end of each rank's log shows where it was",
                savable=False,
                lost=True,
            )
        return [task.result() for task in tasks]
    finally:
        for task in [*tasks, watching]:
            task.cancel()


async def _never() -> str:
    return await asyncio.get_running_loop().create_future()


async def _value(call: Awaitable[R]) -> R:
    return await call


def _errors(tasks: Sequence[asyncio.Task[R]]) -> dict[int, BaseException]:
    errors = {}
    for rank, task in enumerate(tasks):
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None:
            errors[rank] = error
    return errors


def _is_alive(error: BaseException) -> bool:
    """Whether a rank that answered with this error is still there, with weights that are sound."""
    return isinstance(error, RayTaskError) and not isinstance(error.cause, NotFiniteError)


def _blame(error: BaseException) -> int:
    """0: a cause for sure (the process died); 1: the rank's own error; 2: likely a consequence."""
    if not isinstance(error, RayTaskError) and kind_of(error) == "infra":
        return 0
    return 2 if any(word in str(error).lower() for word in CONSEQUENCES) else 1


def message_of(error: BaseException) -> str:
    """The rank's own error; a mistake in its program with the traceback."""
    if isinstance(error, RayTaskError) and error.cause is not None and kind_of(error) != "bug":
        return f"{type(error.cause).__name__}: {error.cause}"
    return words(error)
