"""A rollout actor as the driver calls it: Ray's handle, with the types that Ray does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from cohort.actors.records import Failure, Group, GroupMeta, Place, Request, WeightsInfo

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle, ActorProxy

    from cohort.actors.rollout import RolloutActor


class RolloutHandle:
    """Calls to one `RolloutActor`; its methods say what they do. Each returns at once.

    Args:
        actor: What Ray returned when the actor was made.
    """

    def __init__(self, actor: ActorProxy[RolloutActor]) -> None:
        # Ray's type is a union with the class, for classes whose methods `ray.method` decorates.
        self._actor = cast("ActorHandle[RolloutActor]", actor)

    def place(self) -> ObjectRef[Place]:
        return self._actor.place.remote()

    def start(self, cores: tuple[int, ...], serve_loaded: bool) -> ObjectRef[float | Failure]:
        return self._actor.start.remote(cores, serve_loaded)

    def sync(self, info: WeightsInfo, probe: list[int]) -> ObjectRef[list[float] | Failure]:
        return self._actor.sync.remote(info, probe)

    def submit(self, requests: list[Request]) -> ObjectRef[Failure | None]:
        return self._actor.submit.remote(requests)

    def completion(
        self, group_id: str, index: int
    ) -> tuple[ObjectRef[Failure | None], ObjectRef[Group]]:
        return self._actor.completion.options(num_returns=2).remote(group_id, index)

    def collect(self, group_id: str) -> tuple[ObjectRef[GroupMeta | Failure], ObjectRef[Group]]:
        return self._actor.collect.options(num_returns=2).remote(group_id)

    def forget(self, group_id: str) -> None:
        self._actor.forget.remote(group_id)

    def memory(self) -> ObjectRef[int]:
        return self._actor.memory.remote()

    def kill(self) -> None:
        """End the actor now; its watcher ends the engine."""
        import ray

        ray.kill(self._actor)
