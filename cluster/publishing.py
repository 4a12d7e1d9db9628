"""Publishes the learner's weights to the engines, which prove that they hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cohort.actors.pool import RolloutPool
from cohort.actors.probe import Probe
from cohort.cluster.config import Config
from cohort.cluster.launch import Services
from cohort.cluster.placement import several_machines
from cohort.cluster.prepare import Prepared, first_probe
from cohort.learner.learner import Learner

# Engine and learner use different kernels: the gap is about 0.1 in bfloat16, an eighth of that in
# float16, below 1e-4 in float32.
PROBE_TOLERANCE = {"bfloat16": 0.5, "float16": 0.1, "float32": 0.01}
FLOAT8_PROBE_TOLERANCE = 1.0
# The limit that the first update's gap leads to is no less than this fraction of them.
PROBE_FLOOR = 0.1


@dataclass(frozen=True)
class Published:
    """Weights that every engine has proven to hold.

    Attributes:
        fingerprint: Of the bytes that were published.
        gap: The largest between learner and engines on the probe, nats a token.
    """

    version: int
    fingerprint: str
    gap: float


@dataclass
class Publisher:
    """Publishes the learner's weights to the engines.

    Attributes:
        probe: A sequence that learner and engines score under the same weights, and how far the two
            may be apart (`actors.probe_tolerance`).
        remote: Whether what was published last can be loaded on other machines than the learner's.
    """

    learner: Learner
    pool: RolloutPool
    probe: Probe
    remote: bool = False

    @classmethod
    def of(cls, prepared: Prepared, actors: Services) -> Publisher:
        """The publisher of a run whose actors were started."""
        tolerance = usual_tolerance(prepared.config)
        floor: float | None = PROBE_FLOOR * tolerance
        if (given := prepared.config.actors.probe_tolerance) is not None:
            tolerance, floor = given, None
        probe = Probe(first_probe(prepared), [], tolerance, floor)
        return cls(actors.learner, actors.pool, probe)

    async def publish(self) -> Published:
        """Have every engine load the learner's weights and prove that it did.

        Raises:
            RolloutError: engines that do not hold these weights, again and again.
            LearnerError: the learner is lost.
        """
        self.remote = several_machines()
        info = await self.learner.publish(remote=self.remote)
        # Not while the engines load: on shared cores both would wait for each other.
        logprobs = await self.learner.logprobs(self.probe.token_ids)
        gap = await self.pool.sync(info, replace(self.probe, logprobs=logprobs))
        return Published(info.version, info.fingerprint, gap)


def usual_tolerance(config: Config) -> float:
    """How far engine and learner may be apart where the config does not say, nats a token."""
    if config.actors.quantization != "none" or config.learner.float8 != "off":
        return FLOAT8_PROBE_TOLERANCE
    return PROBE_TOLERANCE[config.model.precision]
