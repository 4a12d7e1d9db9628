"""RewardPool: the driver's view of the reward workers.

A call goes to an idle worker that has just answered a ping. A worker that died or is frozen leaves
the queue at once, is started again and returns when it answers; the call goes to another one.
Everything here runs in the driver's asyncio loop and sees sizes and references, never texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cohort.actors.errors import CohortError, failure_of, kind_of, words
from cohort.actors.records import Failure, Group, ScoredGroup, ScoreMeta
from cohort.actors.witness import Witnesses
from cohort.rewards.handle import RewardHandle
from cohort.rewards.watching import Silent, Worker, answer_of, late_answer, retrieve_error

if TYPE_CHECKING:
    from ray import ObjectRef

    from cohort.rewards.worker import ScoredPart

logger = logging.getLogger(__name__)
# What the driver sees of a call's answer, and what stays in the object store.
Seen = TypeVar("Seen")
Kept = TypeVar("Kept")
Begin: TypeAlias = "Callable[[RewardHandle], tuple[ObjectRef[Seen], ObjectRef[Kept]]]"
Part: TypeAlias = "ObjectRef[Group]"
MaybeScored: TypeAlias = "ObjectRef[ScoredPart] | None"

# Calls for one group: after so many failures, the cause is the group and not the workers.
MAX_ATTEMPTS = 3
MAX_RESTARTS = 3  # of one worker in a row, without a call answered between them
# An idle worker answers a ping in milliseconds; a slower one is waited for in the background.
PING_S = 2.0
UNSEEN_S = 30.0  # a machine on which nobody answers for so long is lost
RESTART_S = 180.0  # for a new worker: a process, and the loading of its functions
RETRY_S = 0.2


class RewardPoolError(CohortError):
    """No reward worker is left; the message says how the last one ended and what to do."""


@dataclass(frozen=True)
class Lost(Failure):
    """The completions of a group were lost with a machine; the group can be generated again."""


class RewardPool:
    """Sends completions and groups to idle reward workers. Used by one loop in the driver.

    Args:
        handles: The workers.
        timeout_s: Seconds within which a healthy worker answers any call.
        timeout_key: The config key that `timeout_s` follows from, with its value, for messages.
        pings_while_scoring: The workers answer `ping` during a call: see `watched_worker_class`.
        streams: Some function scores completions before their group is complete.
        make_worker: Makes another worker in place of one that Ray does not start again.
        notify: Tells the user, in one line, that a worker has ended.
        unseen_s: Seconds without an answer after which a worker that nobody can look at is started
            again; others are as soon as they are frozen.
        restart_s: Seconds within which a new worker answers.
    """

    def __init__(
        self,
        handles: Sequence[RewardHandle],
        timeout_s: float,
        *,
        timeout_key: str = "rewards.timeout_s",
        pings_while_scoring: bool = False,
        streams: bool = True,
        make_worker: Callable[[], RewardHandle] | None = None,
        notify: Callable[[str], None] = logger.warning,
        unseen_s: float = UNSEEN_S,
        restart_s: float = RESTART_S,
    ) -> None:
        self._witnesses = Witnesses()
        self._workers = [
            Worker(index, handle, self._witnesses) for index, handle in enumerate(handles)
        ]
        self._timeout_s = timeout_s
        self._timeout_key = timeout_key
        self._pings_while_scoring = pings_while_scoring
        self._streams = streams
        self._make_worker = make_worker
        self._notify = notify
        self._unseen_s = unseen_s
        self._restart_s = restart_s
        # Changes when a worker becomes idle or is given up.
        self._changed = asyncio.Condition()
        self._idle = list(self._workers)
        self._last_end = "there was none from the start"
        self._background: set[asyncio.Task[object]] = set()
        # Completions that wait for an idle worker, and the call that will have them.
        self._waiting: dict[str, tuple[list[Part], asyncio.Task[MaybeScored]]] = {}
        self.restarts = 0

    async def check(self, timeout_s: float) -> None:
        """Wait until every worker has loaded its reward functions.

        Args:
            timeout_s: Seconds to wait at most.

        Raises:
            RewardPoolError: Too few are ready in time, or one failed; the message has its error.
        """
        pings = [self._spawn(worker.ping()) for worker in self._workers]
        try:
            # Not `wait_for`: cancelled, it never looks at the error of what it waited for.
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.gather(*pings)
        except TimeoutError:
            ready = sum(ping.done() and not ping.cancelled() for ping in pings)
            raise RewardPoolError(
                f"{ready} of {len(pings)} reward workers were ready after {timeout_s:g} s "
                "(cluster.start_timeout_s; rewards.workers may exceed the cluster)"
            ) from None
        for worker, answer in zip(self._workers, answers, strict=True):
            if isinstance(answer, Exception):
                raise RewardPoolError(
                    f"reward worker {worker.index} could not start: {words(answer)}"
                ) from answer

    def score_part(self, name: str, part: Part) -> asyncio.Task[MaybeScored]:
        """Have a completion scored before its group is complete.

        Args:
            name: Of the group. Completions of one name that wait for a worker share a call.
            part: A group with this completion only.

        Returns:
            The task of the call. Its result is a reference for `score`, or None when the call
            failed and `score` has to score the completion with its group.
        """
        if not self._streams:
            return asyncio.create_task(asyncio.sleep(0))
        parts, call = self._waiting.get(name, ([], None))
        if call is None or call.done() or call.cancelling():
            parts = []
            call = asyncio.create_task(self._score_parts(name, parts))
            self._waiting[name] = (parts, call)
            # Here, for a task that is cancelled before it begins runs nothing of its own.
            call.add_done_callback(lambda _: self._closed(name, parts))
        parts.append(part)
        return call

    async def _score_parts(self, name: str, parts: list[Part]) -> MaybeScored:
        # Called when a worker is idle; what arrives later is another call.
        failure, scored = await self._call(
            "completions could not be scored",
            lambda handle: handle.score_part(self._closed(name, parts)),
        )
        return None if failure is not None else scored

    def _closed(self, name: str, parts: list[Part]) -> list[Part]:
        """The parts of a call that gets no more of them."""
        if name in self._waiting and self._waiting[name][0] is parts:
            del self._waiting[name]
        return parts

    async def score(
        self, group: ObjectRef[Group], parts: Sequence[ObjectRef[ScoredPart]] = ()
    ) -> tuple[ScoreMeta | Failure, ObjectRef[ScoredGroup] | None]:
        """Score one group.

        Args:
            group: A reference to it; its texts never reach the driver.
            parts: Results of `score_part` for its completions, which are not scored again.

        Returns:
            What the driver may see, and a reference to the whole; or a Failure and None. The
            Failure is a `Lost` when the group itself is lost.

        Raises:
            RewardPoolError: No worker is left.
        """
        outcome: tuple[ScoreMeta | Failure, ObjectRef[ScoredGroup] | None] = await self._call(
            "a group could not be scored", lambda handle: handle.score(group, parts)
        )
        if isinstance(outcome[0], Lost) and parts:
            # The parts may be lost, and the group still there.
            return await self.score(group)
        return outcome

    async def _call(
        self, what: str, begin: Begin[Seen, Kept]
    ) -> tuple[Seen | Failure, ObjectRef[Kept] | None]:
        """The answer of an idle worker, and a reference; a Failure and None after every attempt."""
        failure = Failure("infra", what, "no attempt was made")
        for _ in range(MAX_ATTEMPTS):
            worker = await self._idle_worker()
            using = self._use(worker, what, begin)
            # When this is cancelled, the worker stays busy until it has answered.
            outcome = await asyncio.shield(self._spawn(using))
            if not isinstance(outcome[0], Failure):
                return outcome
            failure = outcome[0]
            if failure.kind != "infra" or isinstance(failure, Lost):
                break
        return failure, None

    async def _idle_worker(self) -> Worker:
        """Wait for a worker that is idle and answers."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._idle or not self._workers)
                if not self._workers:
                    raise RewardPoolError(
                        f"no reward worker is left: {self._last_end}. If memory ran out, lower "
                        "rewards.workers or rewards.memory_gb; the logs of Ray's session say more"
                    )
                worker = self._idle.pop(0)
            ping = self._spawn(worker.ping())
            try:
                answer = await asyncio.wait_for(asyncio.shield(ping), PING_S)
            except BaseException as error:
                self._spawn(self._await_late_ping(worker, ping))
                if not isinstance(error, TimeoutError):
                    raise
            else:
                if isinstance(answer, str):
                    return worker
                self._spawn(self._replace(worker, _line(answer)))

    async def _await_late_ping(self, worker: Worker, ping: asyncio.Task[str | Exception]) -> None:
        """Make a worker idle when it answers a late ping; else replace it."""
        try:
            answer = await late_answer(worker, ping, self._unseen_s)
        except Silent as silent:
            return await self._replace(worker, str(silent), kill=True)
        if isinstance(answer, str):
            await self._make_idle(worker)
        else:
            await self._replace(worker, _line(answer))

    async def _use(
        self, worker: Worker, what: str, begin: Begin[Seen, Kept]
    ) -> tuple[Seen | Failure, ObjectRef[Kept] | None]:
        """One call to a worker, which becomes idle again or is replaced."""
        from ray.exceptions import ObjectLostError, RayError, RayTaskError

        try:
            seen, kept = begin(worker.handle)
            answer = await answer_of(
                worker,
                seen,
                self._timeout_s,
                self._timeout_key,
                self._pings_while_scoring,
                self._unseen_s,
            )
        except Silent as silent:
            self._spawn(self._replace(worker, str(silent), kill=True))
            return Failure("infra", what, f"reward worker {worker.index}: {silent}"), None
        except RayTaskError as error:
            # The worker lives: its own code raised, or its arguments are lost.
            await self._make_idle(worker)
            if isinstance(error.cause, RayError):
                return Lost("infra", what, words(error)), None
            if kind_of(error) == "bug":
                raise
            return failure_of(error, what), None
        except ObjectLostError as error:
            await self._make_idle(worker)
            return Lost("infra", what, words(error)), None
        except RayError as error:
            # RayActorError, and the errors of deaths by memory or with a node.
            self._spawn(self._replace(worker, _line(error)))
            return Failure("infra", what, f"reward worker {worker.index}: {words(error)}"), None
        except BaseException:
            # Cancelled with the pool, or a bug.
            await self._make_idle(worker)
            raise
        worker.restarts = 0
        await self._make_idle(worker)
        return answer, kept

    async def scale(self, count: int) -> None:
        """Have so many workers. New ones join when they answer; who has a call ends it first."""
        staying = [worker for worker in self._workers if not worker.leaving]
        for worker in staying[count:]:
            worker.leaving = True
            if worker in self._idle:
                self._idle.remove(worker)
                self._end(worker)
        for _ in range(count - len(staying)):
            assert self._make_worker is not None, "only a pool that can make workers grows"
            index = next(i for i in itertools.count() if i not in {w.index for w in self._workers})
            worker = Worker(index, self._make_worker(), self._witnesses)
            self._workers.append(worker)
            self._spawn(self._join(worker))

    async def _join(self, worker: Worker) -> None:
        answer = await self._restarted(worker)
        if isinstance(answer, str):
            await self._make_idle(worker)
        else:
            await self._replace(worker, _line(answer), kill=True)

    def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.handle.kill()

    @property
    def count(self) -> int:
        """Workers that are to stay."""
        return sum(not worker.leaving for worker in self._workers)

    async def _make_idle(self, worker: Worker) -> None:
        if worker.leaving:
            return self._end(worker)
        async with self._changed:
            self._idle.append(worker)
            self._changed.notify_all()

    async def _replace(self, worker: Worker, why: str, kill: bool = False) -> None:
        """Start a worker, which runs still if `kill`, again; after MAX_RESTARTS give it up."""
        failed = False
        while worker.restarts < MAX_RESTARTS:
            worker.restarts += 1
            self.restarts += 1
            self._notify(f"reward worker {worker.index} is replaced: {why}")
            worker.place = None
            try:
                if failed and self._make_worker is not None:
                    worker.handle.kill()
                    worker.handle = self._make_worker()
                elif kill or failed:
                    worker.handle.kill(restart=True)
                answer = await self._restarted(worker)
            # Whatever Ray raises: a worker that cannot be started is given up.
            except Exception as error:  # noqa: BLE001
                answer = error
            if isinstance(answer, str):
                return await self._make_idle(worker)
            why, failed = _line(answer), True
        with contextlib.suppress(Exception):
            worker.handle.kill()
        async with self._changed:
            self._workers.remove(worker)
            self._last_end = f"reward worker {worker.index} was given up: {why}"
            self._notify(f"{self._last_end}; {len(self._workers)} are left")
            self._changed.notify_all()

    async def _restarted(self, worker: Worker) -> str | Exception:
        """The answer of a restarted worker to a ping; the error if it is dead or late."""
        from ray.exceptions import ActorUnavailableError

        give_up = time.monotonic() + self._restart_s
        while True:
            ping = self._spawn(worker.ping())
            try:
                answer = await asyncio.wait_for(ping, max(0.0, give_up - time.monotonic()))
            except TimeoutError:
                return TimeoutError(f"not started again within {self._restart_s:g} s")
            if not isinstance(answer, ActorUnavailableError):
                return answer
            await asyncio.sleep(RETRY_S)  # Ray is still starting it

    def _spawn(self, work: Coroutine[object, object, Seen]) -> asyncio.Task[Seen]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(retrieve_error)
        return task

    def kill(self) -> None:
        """End every worker now; their watchers end what they started."""
        for task in self._background:
            task.cancel()
        for worker in self._workers:
            worker.handle.kill()
        self._witnesses.kill()


def _line(error: BaseException) -> str:
    """An error in a line."""
    return words(error).strip().partition("\n")[0]
