"""RewardPool: the driver's view of the reward actors.

A call goes to an idle actor that has just answered a ping. An actor that died, or is frozen, leaves
the queue at once, is started again and comes back when it answers; the call goes to another one.
Everything here runs in the driver's asyncio loop and sees sizes and references, never texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from cohort.actors.errors import CohortError, failure_of, kind_of, words
from cohort.actors.records import Failure, Group, ScoredGroup, ScoreMeta

if TYPE_CHECKING:
    from ray import ObjectRef

    from cohort.rewards.worker import ScoredPart

logger = logging.getLogger(__name__)
# What the driver sees of a call's answer, and what stays in the object store.
Seen = TypeVar("Seen")
Kept = TypeVar("Kept")
# Ray's handle of a reward worker; its types give an actor's methods no `.remote`.
Handle: TypeAlias = Any
Begin: TypeAlias = "Callable[[Handle], tuple[ObjectRef[Seen], ObjectRef[Kept]]]"
Part: TypeAlias = "ObjectRef[Group]"
Known: TypeAlias = "ObjectRef[ScoredPart] | None"

# Of one group: what failed that often with actors that were well is not the actors' fault.
MAX_ATTEMPTS = 3
MAX_RESTARTS = 3  # of one actor in a row, without a call answered between them
# An idle actor answers a ping in milliseconds; one that needs longer is looked at by itself.
PING_S = 2.0
PING_EVERY_S = 5.0
FROZEN_S = 30.0  # without any answer for so long, a process (or its machine) is stopped
RESTART_S = 180.0  # for a new actor: a process, and the loading of its functions
RETRY_S = 0.2


class RewardPoolError(CohortError):
    """No reward actor is left; the message says what happened to the last one and what to do."""


@dataclass(frozen=True)
class Lost(Failure):
    """The completions of a group are gone with a machine: the group can be generated again."""


@dataclass
class _Worker:
    """A reward actor. restarts: in a row, without an answer to a call between them."""

    index: int
    handle: Handle
    restarts: int = 0


class RewardPool:
    """Sends completions and groups to idle reward actors. Used by one loop in the driver.

    timeout_s: within which an actor that is well answers any call. timeout_key: what it follows
    from, in words. pings_while_judging: the actors answer `ping` during a call (see
    `watched_actor_class`), so that a frozen one is found by its silence. streams: some function
    judges completions before their group is complete. make_actor: makes another actor in place of
    one that Ray does not start again. notify: tells the user, in a line, of an actor's end.
    frozen_s: without any answer for so long, an actor is started again. restart_s: how long a new
    one may need before it answers.
    """

    def __init__(
        self,
        actors: list[Handle],
        timeout_s: float,
        *,
        timeout_key: str = "rewards.timeout_s",
        pings_while_judging: bool = False,
        streams: bool = True,
        make_actor: Callable[[], Handle] | None = None,
        notify: Callable[[str], None] = logger.warning,
        frozen_s: float = FROZEN_S,
        restart_s: float = RESTART_S,
    ) -> None:
        self._workers = [_Worker(index, actor) for index, actor in enumerate(actors)]
        self._timeout_s = timeout_s
        self._timeout_key = timeout_key
        self._pings_while_judging = pings_while_judging
        self._streams = streams
        self._make_actor = make_actor
        self._notify = notify
        self._frozen_s = frozen_s
        self._restart_s = restart_s
        # Changes when an actor becomes idle or is given up.
        self._changed = asyncio.Condition()
        self._idle = list(self._workers)
        self._last_words = "there was none from the start"
        self._background: set[asyncio.Task[object]] = set()
        # Completions that wait for an idle actor, and the call they will be in.
        self._waiting: dict[str, tuple[list[Part], asyncio.Task[Known]]] = {}
        self.restarts = 0

    async def check(self, timeout_s: float) -> None:
        """Wait until every actor has loaded its reward functions.

        Raises RewardPoolError with the actor's own words (a function that cannot be found, say).
        """
        pings = [self._spawn(self._ping(worker)) for worker in self._workers]
        try:
            # Not `wait_for`: cancelled, it never looks at the error of what it waited for.
            async with asyncio.timeout(timeout_s):
                said = await asyncio.gather(*pings)
        except TimeoutError:
            ready = sum(ping.done() and not ping.cancelled() for ping in pings)
            raise RewardPoolError(
                f"{ready} of {len(pings)} reward actors were ready after {timeout_s:g} s "
                "(cluster.start_timeout_s; rewards.workers may exceed the cluster)"
            ) from None
        for worker, answer in zip(self._workers, said, strict=True):
            if isinstance(answer, Exception):
                raise RewardPoolError(
                    f"reward actor {worker.index} could not start: {words(answer)}"
                ) from answer

    def judge(self, name: str, part: Part) -> asyncio.Task[Known]:
        """Have a completion judged before its group is complete.

        name: of the group; completions of one name that arrive while every actor is busy share a
        call. part: a group of one. Returns the task of the call: a reference for `score`, or None
        when it failed; `score` then judges the completion with its group.
        """
        if not self._streams:
            return asyncio.create_task(asyncio.sleep(0))
        call = self._waiting.get(name)
        if call is None or call[1].done() or call[1].cancelling():
            parts: list[Part] = []
            call = self._waiting[name] = (parts, asyncio.create_task(self._judge(name, parts)))
            # Here, for a task that is cancelled before it begins runs nothing of its own.
            call[1].add_done_callback(lambda _: self._no_longer_waiting(name, parts))
        call[0].append(part)
        return call[1]

    async def _judge(self, name: str, parts: list[Part]) -> Known:
        def begin(actor: Handle) -> Handle:
            # The parts are read now, when an actor is idle; what arrives later is another call.
            self._no_longer_waiting(name, parts)
            return actor.judge.options(num_returns=2).remote(*parts)

        failure, judged = await self._call("completions could not be judged", begin)
        return None if failure is not None else judged

    def _no_longer_waiting(self, name: str, parts: list[Part]) -> None:
        if name in self._waiting and self._waiting[name][0] is parts:
            del self._waiting[name]

    async def score(
        self, group: ObjectRef[Group], judged: Sequence[ObjectRef[ScoredPart]] = ()
    ) -> tuple[ScoreMeta | Failure, ObjectRef[ScoredGroup] | None]:
        """Score one group, given by reference; returns what the driver may see, and a reference.

        judged: what `judge` said of its completions, which is not asked again. The Failure is a
        `Lost` when the group itself is gone. Raises RewardPoolError when no actor is left.
        """
        outcome: tuple[ScoreMeta | Failure, ObjectRef[ScoredGroup] | None] = await self._call(
            "a group could not be scored",
            lambda actor: actor.score.options(num_returns=2).remote(group, *judged),
        )
        if isinstance(outcome[0], Lost) and judged:
            # What was said of its completions may be gone, and the group still there.
            return await self.score(group)
        return outcome

    async def _call(
        self, what: str, begin: Begin[Seen, Kept]
    ) -> tuple[Seen | Failure, ObjectRef[Kept] | None]:
        """What an idle actor answers to the call that `begin` makes: a value, and a reference.

        Failure and None when nothing helps. A caller that is cancelled leaves its actor busy until
        that has answered.
        """
        failure = Failure("infra", what, "no attempt was made")
        for _ in range(MAX_ATTEMPTS):
            worker = await self._idle_worker()
            using = self._use(worker, what, begin)
            outcome = await asyncio.shield(self._spawn(using))
            if not isinstance(outcome[0], Failure):
                return outcome
            failure = outcome[0]
            if failure.kind != "infra" or isinstance(failure, Lost):
                break
        return failure, None

    async def _idle_worker(self) -> _Worker:
        """Wait for an actor that is idle and answers."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._idle or not self._workers)
                if not self._workers:
                    raise RewardPoolError(
                        f"no reward actor is left: {self._last_words}. If they die for memory, "
                        "lower rewards.workers or rewards.memory_gb; what Ray knows is in the logs "
                        "of its session"
                    )
                worker = self._idle.pop(0)
            ping = self._spawn(self._ping(worker))
            try:
                answer = await asyncio.wait_for(asyncio.shield(ping), PING_S)
            except BaseException as error:
                self._spawn(self._look_after(worker, ping))
                if not isinstance(error, TimeoutError):
                    raise
            else:
                if isinstance(answer, str):
                    return worker
                self._spawn(self._replace(worker, _line(answer)))

    async def _ping(self, worker: _Worker) -> str | Exception:
        """What an actor answers to a ping, or the error that came instead."""
        try:
            return str(await worker.handle.ping.remote())
        # Whatever it is, the actor is not one to send a group to.
        except Exception as error:  # noqa: BLE001
            return error

    async def _look_after(self, worker: _Worker, ping: asyncio.Task[str | Exception]) -> None:
        """Take a worker back when it answers a ping that is late, or replace it."""
        try:
            answer = await asyncio.wait_for(ping, self._frozen_s)
        except TimeoutError:
            await self._replace(worker, self._no_sign(), kill=True)
            return
        if isinstance(answer, str):
            await self._take_back(worker)
        else:
            await self._replace(worker, _line(answer))

    def _no_sign(self) -> str:
        return f"no sign of life for {self._frozen_s:g} s"

    async def _use(
        self, worker: _Worker, what: str, begin: Begin[Seen, Kept]
    ) -> tuple[Seen | Failure, ObjectRef[Kept] | None]:
        """One call to an actor, which becomes idle again or is replaced."""
        from ray.exceptions import ObjectLostError, RayError, RayTaskError

        try:
            seen, kept = begin(worker.handle)
            answer = await self._watched(worker, seen)
        except _Silent as silent:
            self._spawn(self._replace(worker, str(silent), kill=True))
            return Failure("infra", what, f"reward actor {worker.index}: {silent}"), None
        except RayTaskError as error:
            # The actor lives: its own code raised, or what it was given could not be had.
            await self._take_back(worker)
            if isinstance(error.cause, RayError):
                return Lost("infra", what, words(error)), None
            if kind_of(error) == "bug":
                raise
            return failure_of(error, what), None
        except ObjectLostError as error:
            await self._take_back(worker)
            return Lost("infra", what, words(error)), None
        except RayError as error:
            # RayActorError, and deaths that are none: for memory, with a node.
            self._spawn(self._replace(worker, _line(error)))
            return Failure("infra", what, f"reward actor {worker.index}: {words(error)}"), None
        except BaseException:
            # Cancelled with the pool, or a mistake of ours.
            await self._take_back(worker)
            raise
        worker.restarts = 0
        await self._take_back(worker)
        return answer, kept

    async def _watched(self, worker: _Worker, seen: Awaitable[Seen]) -> Seen:
        """The answer to a call; raises _Silent when there is none in time, or no sign of life."""
        answer = asyncio.ensure_future(seen)
        answer.add_done_callback(_looked_at)
        interval = min(PING_EVERY_S, self._frozen_s / 4)
        began = heard = time.monotonic()
        said = ""
        ping: asyncio.Task[str | Exception] | None = None
        while True:
            left = began + self._timeout_s - time.monotonic()
            if left <= 0:
                raise _Silent(
                    f"no answer within {self._timeout_s:g} s, the most that {self._timeout_key} "
                    f"allows{said}"
                )
            await asyncio.wait(
                {answer} if ping is None else {answer, ping},
                timeout=min(left, interval),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if answer.done():
                return answer.result()
            if not self._pings_while_judging:
                continue
            if ping is None:
                ping = self._spawn(self._ping(worker))
            elif ping.done():
                # Of an error, the call tells as well.
                if isinstance(text := ping.result(), str):
                    heard, said = time.monotonic(), f" ({text})"
                ping = None
            elif time.monotonic() - heard > self._frozen_s:
                raise _Silent(self._no_sign() + said)

    async def _take_back(self, worker: _Worker) -> None:
        async with self._changed:
            self._idle.append(worker)
            self._changed.notify_all()

    async def _replace(self, worker: _Worker, why: str, kill: bool = False) -> None:
        """Have Ray start an actor again, or make another one; give it up when that fails often.

        kill: it may still run.
        """
        import ray

        anew = False
        answer: str | Exception
        while worker.restarts < MAX_RESTARTS:
            worker.restarts += 1
            self.restarts += 1
            self._notify(f"reward actor {worker.index} is replaced: {why}")
            try:
                if anew and self._make_actor is not None:
                    ray.kill(worker.handle)
                    worker.handle = self._make_actor()
                elif kill or anew:
                    ray.kill(worker.handle, no_restart=False)
                answer = await self._answer(worker)
            # Whatever Ray says: one that cannot be had is given up, and nobody waits for it.
            except Exception as error:  # noqa: BLE001
                answer = error
            if isinstance(answer, str):
                await self._take_back(worker)
                return
            why, anew = _line(answer), True
        with contextlib.suppress(Exception):
            ray.kill(worker.handle)
        async with self._changed:
            self._workers.remove(worker)
            self._last_words = f"reward actor {worker.index} was given up: {why}"
            self._notify(f"{self._last_words}; {len(self._workers)} are left")
            self._changed.notify_all()

    async def _answer(self, worker: _Worker) -> str | Exception:
        """What a restarted actor says; why it does not, if it is dead or takes too long."""
        from ray.exceptions import ActorUnavailableError

        give_up = time.monotonic() + self._restart_s
        while True:
            ping = self._spawn(self._ping(worker))
            try:
                answer = await asyncio.wait_for(ping, max(0.0, give_up - time.monotonic()))
            except TimeoutError:
                return TimeoutError(f"not started again within {self._restart_s:g} s")
            if not isinstance(answer, ActorUnavailableError):
                return answer
            # Ray is still at it.
            await asyncio.sleep(RETRY_S)

    def _spawn(self, work: Coroutine[object, object, Seen]) -> asyncio.Task[Seen]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_looked_at)
        return task

    def kill(self) -> None:
        """End every actor now; their watchers end what they started."""
        import ray

        for task in self._background:
            task.cancel()
        for worker in self._workers:
            ray.kill(worker.handle)


class _Silent(Exception):
    """An actor does not answer, though no error says that it died."""


def _looked_at(task: asyncio.Future[Seen]) -> None:
    """Whoever waits for it sees its error; when nobody does any more, nothing is printed."""
    if not task.cancelled():
        task.exception()


def _line(error: BaseException) -> str:
    """An error in a line."""
    return words(error).strip().partition("\n")[0]
