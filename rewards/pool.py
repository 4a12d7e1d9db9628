"""RewardPool: the driver's view of the reward actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from actors.records import Failure, ScoreMeta


class RewardPool:
    """Sends completions and groups to idle reward actors. Used by one loop in the driver."""

    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self._actors = actors
        self._timeout_s = timeout_s
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        # Completions that wait for an idle actor, and the call they will be in.
        self._waiting: dict[str, tuple[list[Any], asyncio.Task[Any | None]]] = {}
        for actor in actors:
            self._idle.put_nowait(actor)

    async def check(self, timeout_s: float) -> None:
        """Wait until every actor has loaded its reward functions.

        Raises the actor's own error (a function that cannot be found, say), or TimeoutError.
        """
        waiting = [actor.ping.remote() for actor in self._actors]
        # Not `wait_for`: cancelled, it never looks at the error of what it waited for.
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*waiting)

    def judge(self, name: str, part: Any) -> asyncio.Task[Any | None]:
        """Have a completion judged before its group is complete.

        name: of the group; completions of one name that arrive while every actor is busy share a
        call. part: a reference to a group of one. Returns the task of the call: a reference for
        `score`, or None when it failed; `score` then judges the completion with its group.
        """
        call = self._waiting.get(name)
        if call is None:
            parts: list[Any] = []
            call = self._waiting[name] = (parts, asyncio.create_task(self._judge(name, parts)))
        call[0].append(part)
        return call[1]

    async def _judge(self, name: str, parts: list[Any]) -> Any | None:
        def begin(actor: Any) -> Any:
            # The parts are read now, when an actor is idle; what arrives later is another call.
            self._waiting.pop(name, None)
            return actor.judge.options(num_returns=2).remote(*parts)

        failure, judged = await self._call("completions could not be judged", begin)
        return None if failure is not None else judged

    async def score(
        self, group: Any, judged: Sequence[Any] = ()
    ) -> tuple[ScoreMeta | Failure, Any]:
        """Score one group, given by reference; returns what the driver may see, and a reference.

        judged: what `judge` said of its completions, which is not asked again.
        """
        return await self._call(
            "a group could not be scored",
            lambda actor: actor.score.options(num_returns=2).remote(group, *judged),
        )

    async def _call(self, what: str, begin: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What an idle actor answers to the call that `begin` makes: a value, and a reference.

        A reward actor that died is started again by Ray; one is then asked once more. Failure and
        None when nothing helps.
        """
        from ray.exceptions import RayActorError

        last = "no attempt was made"
        for _ in range(3):
            actor = await self._idle.get()
            try:
                seen, kept = begin(actor)
                return await asyncio.wait_for(seen, self._timeout_s), kept
            except RayActorError as error:
                last = f"a reward actor died: {error}"
            except TimeoutError:
                last = f"no answer within {self._timeout_s:.0f} s (rewards.timeout_s sets this)"
            finally:
                self._idle.put_nowait(actor)
        return Failure("infra", what, last), None

    def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
