"""Workers of environments as rollout actors and the driver call them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from cohort.actors.errors import kind_of
from cohort.actors.records import Prompt
from cohort.actors.turns import EpisodeEnd, EpisodeFailure, FinishReason, NextTurn, Stage
from cohort.rewards.environments.base import EnvironmentLoadError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle, ActorProxy

    from cohort.rewards.environments.worker import EnvironmentWorker

# What a worker has beyond an environment's own deadlines: to start processes, to end what hangs.
SLACK_S = 150.0
# Between two calls of a worker that is being started again.
RESTART_S = 0.5


class EnvironmentHandle:
    """One `EnvironmentWorker`; see `cohort.actors.records.EpisodeHost`.

    Args:
        actor: What Ray returned when the worker was made.
        step_timeout_s: `environments.step_timeout_s`.
    """

    def __init__(self, actor: ActorProxy[EnvironmentWorker], step_timeout_s: float) -> None:
        self._actor = cast("ActorHandle[EnvironmentWorker]", actor)
        self._timeout_s = 2 * step_timeout_s + SLACK_S

    async def begin(
        self, episode_id: str, prompt: Prompt, seed: int, alone: bool
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.begin`. Waits for a worker that Ray is starting again."""
        from ray.exceptions import ActorUnavailableError

        async def call() -> NextTurn | EpisodeEnd:
            while True:
                try:
                    return await self._begun(episode_id, prompt, seed, alone)
                except ActorUnavailableError:
                    # Otherwise what was lost with it would be begun again in vain.
                    await asyncio.sleep(RESTART_S)

        return await self._answer(call(), "reset")

    def _begun(
        self, episode_id: str, prompt: Prompt, seed: int, alone: bool
    ) -> ObjectRef[NextTurn | EpisodeEnd]:
        return self._actor.begin.remote(episode_id, prompt, seed, alone)

    async def step(
        self,
        episode_id: str,
        token_ids: np.ndarray,
        finish_reason: FinishReason,
        logprobs: np.ndarray,
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.step`."""
        call: ObjectRef[NextTurn | EpisodeEnd] = self._actor.step.remote(
            episode_id, token_ids, finish_reason, logprobs
        )
        return await self._answer(call, "step")

    def forget(self, episode_id: str) -> None:
        """See `EpisodeHost.forget`."""
        # A worker that is gone has forgotten everything.
        with contextlib.suppress(Exception):
            self._actor.forget.remote(episode_id)

    def check(self) -> ObjectRef[str | None]:
        """Why the worker cannot play episodes, or None."""
        return self._actor.check.remote()

    def kill(self) -> None:
        """End the worker now; its watcher ends what it started."""
        import ray

        ray.kill(self._actor)

    async def _answer(
        self, call: Awaitable[NextTurn | EpisodeEnd], stage: Stage
    ) -> NextTurn | EpisodeEnd:
        """What the worker answers; its loss, and its mistakes, are failures of the episode."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError:
            message = f"the worker of environments gave no answer within {self._timeout_s:g} s"
            # Frozen: Ray starts another one in its place.
            with contextlib.suppress(Exception):
                import ray

                ray.kill(self._actor, no_restart=False)
            return EpisodeEnd("failed", failure=EpisodeFailure("infra", stage, message))
        except Exception as error:  # noqa: BLE001 - process boundary: the error becomes a value
            message = f"the worker of environments: {type(error).__name__}: {error}"
            return EpisodeEnd("failed", failure=EpisodeFailure(kind_of(error), stage, message))


class EnvironmentPool:
    """The workers of environments of a run, each group's episodes on one of them, in turns."""

    def __init__(self, handles: Sequence[EnvironmentHandle]) -> None:
        self._handles = list(handles)
        self._next = itertools.cycle(self._handles)

    def next(self) -> EnvironmentHandle:
        """The worker of the next group."""
        return next(self._next)

    async def check(self, timeout_s: float) -> None:
        """Wait until every worker has loaded the environment.

        Raises:
            EnvironmentLoadError: One could not, or was not ready in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for problem in await asyncio.gather(*(one.check() for one in self._handles)):
                    if problem is not None:
                        raise EnvironmentLoadError(problem)
        except TimeoutError:
            raise EnvironmentLoadError(
                f"the workers of environments were not ready within {timeout_s:g} s "
                "(cluster.start_timeout_s; environments.workers may exceed the cluster)"
            ) from None

    def kill(self) -> None:
        """End all workers."""
        for handle in self._handles:
            handle.kill()
