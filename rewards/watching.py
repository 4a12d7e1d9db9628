"""Whether a reward worker still works: pings to it, and looks at its process when it is silent.

A worker answers pings beside its scoring (see `watched_worker_class`). One that does not is looked
at from outside: stopped, or asleep with all its threads, it is frozen; while it computes it is slow
and left alone, up to the deadline of its call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cohort.actors.records import Place
from cohort.actors.watch import BEAT_S, FROZEN_S, Watch
from cohort.actors.witness import Witnesses
from cohort.rewards.handle import RewardHandle

if TYPE_CHECKING:
    from cohort.rewards.worker import RewardWorker

Seen = TypeVar("Seen")


class Silent(Exception):
    """A worker does not answer, though no error says that it died."""


@dataclass(eq=False)
class Worker:
    """A reward worker.

    Attributes:
        index: For messages.
        handle: Calls to it.
        witnesses: Look at its process.
        restarts: In a row, without an answer to a call between them.
        leaving: It gets no more calls, because there are to be fewer workers.
        place: Where it runs; None before it has told.
    """

    index: int
    handle: RewardHandle
    witnesses: Witnesses = field(default_factory=Witnesses)
    restarts: int = 0
    leaving: bool = False
    place: Place | None = None

    async def ping(self) -> str | Exception:
        """The answer to a ping, or the error that came instead."""
        try:
            text = await self.handle.ping()
            if self.place is None:
                self.place = await self.handle.place()
                self.witnesses.meet([self.place])
        # Whatever the error is, no group may be sent to this worker.
        except Exception as error:  # noqa: BLE001
            return error
        return text

    async def beat(self, watch: Watch, elapsed_s: float, answered: bool) -> None:
        """Take note of whether a ping was answered; of a silent worker also of what it does."""
        if answered:
            watch.heard()
            return
        look = None if self.place is None else await self.witnesses.look(self.place)
        watch.beat(elapsed_s, look=look)


def given_up(watch: Watch, unseen_s: float, last: str = "") -> None:
    """Raise Silent when a worker will not answer any more.

    Args:
        watch: Of the time since it answered last.
        unseen_s: How long it may be silent where nobody can look at it.
        last: What it said last, for the message.
    """
    if watch.frozen:
        raise Silent(f"its process is stopped, or has computed nothing for {FROZEN_S:g} s{last}")
    if watch.look is None and watch.silent_s > unseen_s:
        raise Silent(f"no answer to a ping for {unseen_s:g} s{last}")


async def answer_of(
    worker: Worker, seen: Awaitable[Seen], timeout_s: float, key: str, pings: bool, unseen_s: float
) -> Seen:
    """The answer to a call.

    Args:
        worker: Who was called.
        seen: The call.
        timeout_s: Within which a healthy worker answers.
        key: The config key that this follows from, with its value, for the message.
        pings: The worker answers pings during the call.
        unseen_s: As in `given_up`.

    Raises:
        Silent: The answer is late, or the worker is frozen.
    """
    answer = asyncio.ensure_future(seen)
    answer.add_done_callback(retrieve_error)
    began = beaten = time.monotonic()
    last, watch = "", Watch()
    ping: asyncio.Task[str | Exception] | None = None
    try:
        while True:
            left = began + timeout_s - time.monotonic()
            if left <= 0:
                raise Silent(f"no answer within {timeout_s:g} s, the most that {key} allows{last}")
            await asyncio.wait({answer}, timeout=min(left, BEAT_S))
            if answer.done():
                return answer.result()
            if not pings:
                continue
            now = time.monotonic()
            # More than two beats: it was this process that did not run.
            elapsed, beaten = min(now - beaten, 2 * BEAT_S), now
            if ping is not None:
                await worker.beat(watch, elapsed, answered=ping.done())
                # An error shows in the call as well.
                if ping.done() and isinstance(text := ping.result(), str):
                    last = f" ({text})"
                given_up(watch, unseen_s, last)
            if ping is None or ping.done():
                ping = asyncio.create_task(worker.ping())
    finally:
        if ping is not None:
            ping.cancel()


async def late_answer(
    worker: Worker, ping: asyncio.Task[str | Exception], unseen_s: float
) -> str | Exception:
    """The answer to a ping that is late already; raises Silent when the worker is frozen."""
    watch, beaten = Watch(), time.monotonic()
    while not (await asyncio.wait({ping}, timeout=BEAT_S))[0]:
        now = time.monotonic()
        elapsed, beaten = min(now - beaten, 2 * BEAT_S), now
        await worker.beat(watch, elapsed, answered=False)
        given_up(watch, unseen_s)
    return ping.result()


def retrieve_error(task: asyncio.Future[Seen]) -> None:
    """Keep asyncio from printing an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def watched_worker_class(worker_class: type[RewardWorker]) -> Any:
    """The class for `ray.remote` calls of a reward worker that answers while it scores."""
    import ray

    @ray.method(concurrency_group="health")
    def ping(self: RewardWorker) -> str:
        return str(worker_class.ping(self))

    @ray.method(concurrency_group="health")
    def place(self: RewardWorker) -> Place:
        return worker_class.place(self)

    watched = type(worker_class.__name__, (worker_class,), {"ping": ping, "place": place})
    # Ray's types do not know this option.
    return ray.remote(concurrency_groups={"health": 1})(watched)  # type: ignore[call-overload]
