"""Publishing the policy's weights to the engines."""

from __future__ import annotations

from collections.abc import Sequence

from cohort.actors.process import running_ray
from cohort.actors.records import WeightsInfo
from cohort.learner.state import RankState
from cohort.learner.weights import WeightFiles, gather_named_weights, weight_specs


def publish(
    state: RankState, files: WeightFiles, version: int, keep: Sequence[int], remote: bool
) -> WeightsInfo | None:
    """Rank 0 writes the weights into shared memory; the others take part in gathering them.

    Args:
        state: This rank's.
        files: What was published before.
        version: Of these weights.
        keep: Older versions whose files stay. Others must have no readers any more: their memory
            is used again.
        remote: Also put the bytes into Ray's object store, for engines on other nodes.

    Returns:
        Where the weights are; None on other ranks than 0.
    """
    import numpy as np

    stage = state.spec.learner.zero_stage
    tensors = gather_named_weights(state.model, stage)
    if state.spec.rank != 0:
        for _ in tensors:
            pass
        return None
    specs = weight_specs(state.model, stage)
    fingerprint, nbytes = files.publish(version, keep, specs, tensors)
    path = files.path(version)
    ray = running_ray()
    if remote and ray is None:
        raise ValueError("weights for other nodes travel through Ray, which does not run here")
    return WeightsInfo(
        version=version,
        names=tuple(spec.name for spec in specs),
        fingerprint=fingerprint,
        nbytes=nbytes,
        path=str(path),
        node_id="local" if ray is None else ray.get_runtime_context().get_node_id(),
        remote=ray.put(np.fromfile(path, dtype=np.uint8)) if remote and ray else None,
    )
