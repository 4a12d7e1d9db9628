"""A reward worker as the driver calls it: Ray's handle, with the types that Ray does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from cohort.actors.records import Failure, Group, Place, ScoredGroup, ScoreMeta

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle, ActorProxy

    from cohort.rewards.worker import RewardWorker, ScoredPart


class RewardHandle:
    """Calls to one `RewardWorker`; its methods say what they do. Each returns at once.

    Args:
        actor: What Ray returned when the worker was made.
    """

    def __init__(self, actor: ActorProxy[RewardWorker]) -> None:
        # Ray's type is a union with the class, for classes whose methods `ray.method` decorates.
        self._actor = cast("ActorHandle[RewardWorker]", actor)

    def score_part(
        self, parts: Sequence[ObjectRef[Group]]
    ) -> tuple[ObjectRef[Failure | None], ObjectRef[ScoredPart]]:
        return self._actor.score_part.options(num_returns=2).remote(*parts)

    def score(
        self, group: ObjectRef[Group], parts: Sequence[ObjectRef[ScoredPart]]
    ) -> tuple[ObjectRef[ScoreMeta | Failure], ObjectRef[ScoredGroup]]:
        return self._actor.score.options(num_returns=2).remote(group, *parts)

    def ping(self) -> ObjectRef[str]:
        return self._actor.ping.remote()

    def place(self) -> ObjectRef[Place]:
        return self._actor.place.remote()

    def kill(self, restart: bool = False) -> None:
        """End the worker now; its watcher ends the child process.

        Args:
            restart: Let Ray start it again.
        """
        import ray

        ray.kill(self._actor, no_restart=not restart)
