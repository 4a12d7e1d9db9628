"""From the learner's weights to engines that have proven to hold them."""

from __future__ import annotations

from dataclasses import dataclass

from cohort.actors.pool import Probe, RolloutPool
from cohort.cluster.making import probe_floor, probe_tolerance
from cohort.cluster.prepare import Prepared, first_probe
from cohort.learner.learner import Learner


@dataclass(frozen=True)
class Publisher:
    """Publishes the learner's weights to the engines.

    probe_ids: token ids of a sequence that learner and engines score under the same weights.
    tolerance, floor: how far the two may be apart, nats a token (`actors.probe_tolerance`). remote:
    whether an engine may run on another machine than the learner.
    """

    learner: Learner
    pool: RolloutPool
    probe_ids: list[int]
    tolerance: float
    floor: float | None
    remote: bool

    @classmethod
    def of(cls, prepared: Prepared, learner: Learner, pool: RolloutPool) -> Publisher:
        """The publisher of a run whose actors were started."""
        import ray

        return cls(
            learner,
            pool,
            first_probe(prepared),
            probe_tolerance(prepared.config),
            probe_floor(prepared.config),
            remote=sum(node["Alive"] for node in ray.nodes()) > 1,
        )

    async def publish(self) -> float:
        """Have every engine load the learner's weights and prove that it did.

        Returns:
            The largest gap between learner and engines on the probe, nats a token.

        Raises:
            RolloutError: engines that do not hold these weights, again and again.
            LearnerError: the learner is lost.
        """
        info = await self.learner.publish(remote=self.remote)
        # Not while the engines load: on shared cores both would wait for each other.
        logprobs = await self.learner.logprobs(self.probe_ids)
        return await self.pool.sync(
            info, Probe(self.probe_ids, logprobs, self.tolerance, self.floor)
        )
