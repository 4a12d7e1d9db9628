"""One rank's part of a planned step: forward and backward passes, optimizer updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cohort.actors.records import GroupRef, ScoredGroup
from cohort.learner.batch import build_micro_batch
from cohort.learner.grpo import LossStats, policy_loss
from cohort.learner.objectives import kl_in_reward
from cohort.learner.optimizer import lr_at
from cohort.learner.packing import MicroBatch
from cohort.learner.spec import UpdateResult
from cohort.learner.state import RankState, everywhere


@dataclass
class _Memo:
    """Log-probs [T] that updates on the same micro-batches share, by the micro-batch's index."""

    old: dict[int, torch.Tensor] = field(default_factory=dict)
    reference: dict[int, torch.Tensor] = field(default_factory=dict)


def fetch(
    groups: Sequence[GroupRef], timeout_s: float
) -> tuple[dict[str, ScoredGroup], tuple[int, ...]]:
    """Get groups out of Ray's object store, where they are not at hand already.

    Returns:
        (the groups by id, the indices of those whose objects are gone).
    """
    if all(isinstance(group, ScoredGroup) for group in groups):
        return {group.group.id: group for group in groups}, ()
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    fetched: dict[str, ScoredGroup] = {}
    lost = []
    # Together first: one after the other they would cross the network one by one.
    refs = [group for group in groups if isinstance(group, ray.ObjectRef)]
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    for index, group in enumerate(groups):
        try:
            if isinstance(group, ray.ObjectRef):
                group = ray.get(group, timeout=timeout_s)
            fetched[group.group.id] = group
        except GetTimeoutError:
            raise
        except RayError:
            lost.append(index)
    return fetched, tuple(lost)


def train_step(
    state: RankState, updates: Sequence[Sequence[MicroBatch]], groups: Mapping[str, ScoredGroup]
) -> tuple[UpdateResult, ...]:
    """Carry out the optimizer updates of one step.

    An update moves the optimizer unless the global gradient norm is not finite; then nothing
    changes, on any rank, and its `applied` is False.

    Args:
        state: This rank's.
        updates: The micro-batches of each update; all ranks have equally many.
        groups: The groups of their rows, by id.
    """
    algorithm = state.spec.algorithm
    # The same on all ranks, whatever their rows: they must make the same forward passes.
    same = algorithm.update_on == "all"
    memos = [_Memo()] * len(updates) if same else [_Memo() for _ in updates]
    if algorithm.anchor == "learner" and not same:
        # Before anything moves: what later updates see for the first time.
        for batches, memo in zip(updates[1:], memos[1:], strict=True):
            memo.old = {i: _score(state, batch, groups) for i, batch in enumerate(batches)}
    results = tuple(
        _update(state, batches, groups, memo) for batches, memo in zip(updates, memos, strict=True)
    )
    if any(result.applied for result in results):
        state.steps_done += 1
        if state.reference is not None and algorithm.refreshes_reference(state.steps_done):
            state.reference.become(state.model)
    return results


def _update(
    state: RankState,
    batches: Sequence[MicroBatch],
    groups: Mapping[str, ScoredGroup],
    memo: _Memo,
) -> UpdateResult:
    spec, engine = state.spec, state.engine
    total = spec.total_steps * spec.algorithm.updates_per_step
    learning_rate = lr_at(state.updates_done + 1, spec.learner, total)
    for param_group in engine.optimizer.param_groups:
        param_group["lr"] = learning_rate
    while True:
        loss_scale = _loss_scale(state)
        stats = LossStats()
        for index, batch in enumerate(batches):
            stats += _accumulate(state, batch, groups, memo, index)
        engine.step()
        applied = engine.was_step_applied()
        # DeepSpeed halved the scale: the same update again, so that no batch is lost to it.
        finite = math.isfinite(stats.loss)
        if applied or _loss_scale(state) == loss_scale or not everywhere(finite, state.device):
            break
    state.updates_done += applied
    norm = float(engine.get_global_grad_norm())
    return UpdateResult(stats, applied, norm, learning_rate, loss_scale)


def _loss_scale(state: RankState) -> float:
    """The factor on the loss that keeps small float16 gradients from vanishing."""
    if state.spec.dtype != "float16":
        return 1.0
    return float(state.engine.optimizer.loss_scaler.loss_scale)


def _score(state: RankState, batch: MicroBatch, groups: Mapping[str, ScoredGroup]) -> torch.Tensor:
    """The policy's log-probs of a micro-batch as it is now, [T] without gradient."""
    with torch.no_grad():
        tensors = build_micro_batch(batch, groups).to(state.device)
        return state.engine(tensors, state.spec.temperature, batch.chunks)[0]


def _accumulate(
    state: RankState,
    batch: MicroBatch,
    groups: Mapping[str, ScoredGroup],
    memo: _Memo,
    index: int,
) -> LossStats:
    """Forward and backward over one micro-batch; gradients add up in the engine."""
    spec = state.spec
    tensors = build_micro_batch(batch, groups).to(state.device)
    reference_T = memo.reference.get(index)
    if reference_T is None and state.reference is not None and spec.algorithm.kl_in == "loss":
        reference_T = state.reference.logprobs(tensors, spec.temperature, batch.chunks)
    logprobs_T, entropy_T = state.engine(tensors, spec.temperature, batch.chunks)
    loss, stats = policy_loss(
        tensors.loss_inputs(logprobs_T, entropy_T, memo.old.get(index), reference_T),
        spec.algorithm,
    )
    memo.old.setdefault(index, logprobs_T.detach())
    if reference_T is not None:
        memo.reference[index] = reference_T
    if not loss.isfinite():
        # Clamps can stop a nan on its way back. It must reach the gradients: their global norm is
        # what all ranks look at to agree on leaving the step out.
        loss = loss * float("nan")
    # The loss is this rank's part of a sum over ranks, DeepSpeed averages over them. This is the
    # only scaling: the weights of the tokens hold every normaliser.
    state.engine.backward(loss * spec.world_size, scale_wrt_gas=False)
    return stats


def reference_kl(
    state: RankState, batches: Sequence[MicroBatch], groups: Mapping[str, ScoredGroup]
) -> dict[str, float]:
    """k1 of engine against reference, summed over each completion, in nats, by completion id."""
    if state.reference is None:
        raise ValueError("a KL in the reward needs a reference, and algorithm.kl_coef is 0")
    found: dict[str, float] = {}
    for batch in batches:
        tensors = build_micro_batch(batch, groups).to(state.device)
        reference_T = state.reference.logprobs(tensors, state.spec.temperature, batch.chunks)
        segments = batch.segments
        if not segments:
            continue
        sizes = [segment.tokens for segment in segments]
        for segment, behaviour, reference in zip(
            segments, tensors.behaviour_T.split(sizes), reference_T.split(sizes), strict=True
        ):
            # An episode whose branches share nothing has several segments.
            before = found.get(segment.completion_id, 0.0)
            found[segment.completion_id] = before + kl_in_reward(behaviour, reference)
    return found
