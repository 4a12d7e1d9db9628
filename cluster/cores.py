"""Which cores of a CPU machine engines and learner compute on.

Two programs that both want every core of a machine at once take turns within each of their parallel
loops, and every turn waits for the slowest thread. With cores of their own they do not meet, but
neither can use the other's while that one waits. Which is better follows from when they compute:

- `actors.max_staleness` 0: one after the other. All cores for both.
- 1 or more: at once. Cores of their own, where both have enough for parallel loops of some width
  (OWN_CORES each); on smaller machines the time that an idle core loses outweighs the turns.

`benchmarks/overlap.py` measures both on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from cohort.cluster.config import Config
from cohort.cluster.placement import Device

# For an engine, and for a rank, before cores of their own pay.
OWN_CORES = 2


@dataclass(frozen=True)
class CoreShares:
    """Cores by number; empty: not bound to any, all that there are.

    Attributes:
        engines: Of all engines together.
        learner: Of all ranks together.
        own: Whether they have cores of their own.
    """

    engines: tuple[int, ...] = ()
    learner: tuple[int, ...] = ()

    @property
    def own(self) -> bool:
        return bool(self.engines)


def share_cores(
    config: Config, device: Device, cores: tuple[int, ...], one_machine: bool
) -> CoreShares:
    """Divide the cores of a machine as `cluster.cores` says.

    Args:
        config: The run's.
        device: Engines and ranks on GPUs need no cores of their own.
        cores: Of this machine, those that the run may use.
        one_machine: All actors are on it. On several, Ray places them, and nothing is divided.

    Example:
        >>> share_cores(overlapped, "cpu", (0, 1, 2, 3), one_machine=True)
        CoreShares(engines=(0, 1), learner=(2, 3))
    """
    engines, ranks = config.actors.count, config.learner.workers
    possible = device == "cpu" and one_machine and len(cores) >= engines + ranks
    wanted = config.cluster.cores == "own" or (
        config.cluster.cores == "auto"
        and config.actors.max_staleness > 0
        and len(cores) >= OWN_CORES * (engines + ranks)
    )
    if not (possible and wanted):
        return CoreShares()
    # The same for every engine and rank; what is left over goes to the learner.
    for_engines = max(engines, min(len(cores) - ranks, len(cores) * engines // (engines + ranks)))
    return CoreShares(cores[:for_engines], cores[for_engines:])
