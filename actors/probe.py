"""The probe: a sequence that learner and engines score under the same weights, to compare.

The second line behind the proof of `cohort.actors.proof`: it sees what a digest cannot, an engine
that holds the right numbers and computes something else with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Where the limit is not given: this many times the gap at the first update of the run.
FIRST_GAPS = 5.0
# From this many gaps on, two versions are far enough apart for an engine to be nearer to one.
RESOLVED_GAPS = 4.0


@dataclass(frozen=True)
class Probe:
    """A token sequence that learner and engines score under the same weights, to compare.

    Attributes:
        token_ids: The n tokens.
        logprobs: The learner's, of tokens 1..n-1, nats.
        tolerance: Largest mean absolute difference that an engine may show, nats.
        floor: Where given, the limit is FIRST_GAPS times the gap at the first update instead, but
            no less than this and no more than `tolerance`.
    """

    token_ids: list[int]
    logprobs: list[float]
    tolerance: float
    floor: float | None = None


def probe_gap(learner: Sequence[float], engine: Sequence[float]) -> float:
    """Mean absolute difference between two scorings of the same tokens, in nats."""
    gaps = [abs(ours - theirs) for ours, theirs in zip(learner, engine, strict=True)]
    return sum(gaps) / len(gaps)


def limit_of(probe: Probe, first_gap: float | None) -> float:
    """The largest gap that an engine may show, nats.

    Args:
        probe: What is scored.
        first_gap: The run's first; None: this is it.

    >>> limit_of(Probe([1], [], tolerance=0.5, floor=0.01), first_gap=0.004)
    0.02
    """
    if probe.floor is None or first_gap is None:
        return probe.tolerance
    return min(probe.tolerance, max(probe.floor, FIRST_GAPS * first_gap))


def stale(probe: Probe, before: Probe | None, engine: Sequence[float], gap: float) -> bool:
    """Whether an engine is nearer to the version before than to the one it should serve.

    Only where the two versions differ by more than engines usually do: RESOLVED_GAPS times `gap`,
    the usual one.
    """
    if before is None or before.token_ids != probe.token_ids:
        return False
    if probe_gap(probe.logprobs, before.logprobs) <= RESOLVED_GAPS * gap:
        return False
    return probe_gap(before.logprobs, engine) < probe_gap(probe.logprobs, engine)
