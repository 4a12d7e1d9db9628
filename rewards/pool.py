"""RewardPool: the driver's view of the reward actors."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.records import Failure, ScoreMeta


class RewardPool:
    """Sends each group to an idle reward actor. Used by one asyncio loop in the driver."""

    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self._actors = actors
        self._timeout_s = timeout_s
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for actor in actors:
            self._idle.put_nowait(actor)

    async def check(self, timeout_s: float) -> None:
        """Wait until every actor has loaded its reward functions.

        Raises the actor's own error (a function that cannot be found, say), or TimeoutError.
        """
        waiting = [actor.ping.remote() for actor in self._actors]
        await asyncio.wait_for(asyncio.gather(*waiting), timeout_s)

    async def score(self, group: Any) -> tuple[ScoreMeta | Failure, Any]:
        """Score one group, given by reference; returns what the driver may see, and a reference.

        A reward actor that died is started again by Ray; the group is then judged once more.
        """
        from ray.exceptions import RayActorError

        last = "no attempt was made"
        for _ in range(3):
            actor = await self._idle.get()
            try:
                meta, scored = actor.score.options(num_returns=2).remote(group)
                return await asyncio.wait_for(meta, self._timeout_s), scored
            except RayActorError as error:
                last = f"a reward actor died: {error}"
            except TimeoutError:
                last = f"no answer within {self._timeout_s:.0f} s (rewards.timeout_s sets this)"
            finally:
                self._idle.put_nowait(actor)
        return Failure("infra", "a group could not be scored", last), None

    def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
