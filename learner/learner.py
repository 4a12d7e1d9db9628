"""All learner ranks as one object, for the driver's asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cohort.actors.errors import CohortError, kind_of, words
from cohort.actors.records import ScoredRef, WeightsInfo
from cohort.learner.checkpoint import CheckpointError, NotFiniteError
from cohort.learner.grpo import LossStats
from cohort.learner.plan import MicroBatch, RowCost, StepPlan, plan_step, score_batches
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult
from cohort.learner.worker import LearnerWorker, check_loadable

# When one rank fails, the others fail in the collective operation they share with it. Their errors
# are awaited this long, so that the first cause can be told from its consequences.
GRACE_S = 5.0
CONSEQUENCES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class LearnerError(CohortError):
    """The learner cannot go on; the message names the rank, what it did, and its own error.

    savable: every rank lives and answers, so that what was learned may still be saved.
    """

    def __init__(self, message: str, savable: bool = True) -> None:
        super().__init__(message)
        self.savable = savable


class LostGroups(LearnerError):
    """The objects of some groups are gone, with the machine that held them. Nothing was done."""

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(f"the completions of {', '.join(group_ids)} are gone")
        self.group_ids = tuple(group_ids)


@dataclass(frozen=True)
class StepResult:
    """One step. Means are over all trained tokens of all ranks and updates.

    version: steps applied so far, this one included. applied: False when no update's gradient was
    finite, or when no group was left to train on (then tokens is 0). updates: optimizer updates
    that were tried. loss, grad_norm: means over them, the norm before clipping. learning_rate,
    loss_scale: of the last. k3_kl: estimate of KL(engine || learner), nats per token,
    engine_ratio: mean of learner / engine probability, logprob_abs_max: largest |learner - engine|
    log-prob; all three raw. corrected_fraction: tokens whose weight the correction changed from
    that ratio. reference_kl: estimate of KL(policy || reference), nats per token: k3 over what is
    trained, or k1 over all completions where `algorithm.kl_in` is reward. seconds: of the slowest
    rank.
    """

    version: int
    applied: bool
    updates: int
    nonfinite_in_a_row: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    entropy: float
    clip_fraction: float
    k3_kl: float
    engine_ratio: float
    logprob_abs_max: float
    corrected_fraction: float
    reference_kl: float
    tokens: int
    seconds: float
    trained: int
    filtered: int
    failed: int
    groups_trained: int
    groups_filtered: int
    groups_failed: int
    row_tokens: int
    padded_tokens: int
    micro_batches: int


def pool(
    plan: StepPlan,
    results: Sequence[RankResult],
    version: int,
    nonfinite_in_a_row: int,
    reference_kl: float | None = None,
) -> StepResult:
    """Pool the ranks' sums and counts. Without results, the step had nothing to train on.

    reference_kl: of the step, where it is not the ranks that measure it.
    """
    stats = sum((update.stats for result in results for update in result.updates), LossStats())
    tokens = max(stats.tokens, 1)
    first = results[0].updates if results else ()
    count = max(len(first), 1)
    return StepResult(
        version=version,
        applied=any(update.applied for update in first),
        updates=len(first),
        nonfinite_in_a_row=nonfinite_in_a_row,
        loss=stats.loss / count,
        grad_norm=sum(update.grad_norm for update in first) / count,
        learning_rate=first[-1].learning_rate if first else 0.0,
        loss_scale=first[-1].loss_scale if first else 1.0,
        entropy=stats.entropy / tokens,
        clip_fraction=stats.clipped / tokens,
        k3_kl=stats.k3 / tokens,
        engine_ratio=stats.engine_ratio / tokens,
        logprob_abs_max=stats.log_ratio_abs_max,
        corrected_fraction=stats.corrected / tokens,
        reference_kl=stats.kl / tokens if reference_kl is None else reference_kl,
        tokens=stats.tokens,
        seconds=max((result.seconds for result in results), default=0.0),
        trained=plan.trained,
        filtered=plan.filtered,
        failed=plan.failed,
        groups_trained=plan.groups_trained,
        groups_filtered=plan.groups_filtered,
        groups_failed=plan.groups_failed,
        row_tokens=plan.row_tokens,
        padded_tokens=plan.padded_tokens,
        micro_batches=plan.micro_batches,
    )


class Learner:
    """The gang of learner ranks. One call at a time; every call raises LearnerError on failure."""

    def __init__(self, spec: LearnerSpec, workers: Sequence[Any], facts: ModelFacts) -> None:
        self.spec = spec
        self.facts = facts
        self.version = 0
        self.nonfinite_in_a_row = 0
        self._workers = list(workers)
        self._published: int | None = None

    @classmethod
    async def start(
        cls,
        spec: LearnerSpec,
        actor_options: Sequence[Mapping[str, Any]],
        timeout_s: float = 300.0,
    ) -> Learner:
        """Create one actor per entry of `actor_options` and join them.

        spec: of any rank; rank is filled in here. actor_options: Ray options of each rank's actor.
        timeout_s: longest wait for the actors to be placed, and again for the model to load.
        """
        if len(actor_options) != spec.world_size:
            raise ValueError(
                f"{len(actor_options)} actor options for {spec.world_size} learner ranks"
            )
        worker = ray.remote(LearnerWorker)
        workers = [
            worker.options(**options).remote(replace(spec, rank=rank))
            for rank, options in enumerate(actor_options)
        ]
        try:
            ready = [w.__ray_ready__.remote() for w in workers]
            await _all("starting the process", ready, timeout_s)
            [(address, port)] = await _all(
                "opening the rendezvous", [workers[0].rendezvous.remote()], timeout_s
            )
            setups = [w.setup.remote(address, port, timeout_s) for w in workers]
            facts = await _all("loading the model", setups, timeout_s)
        except BaseException:
            _kill(workers)
            raise
        return cls(spec, workers, facts[0])

    def plan(self, groups: Sequence[ScoredRef], kl: Mapping[str, float] | None = None) -> StepPlan:
        """How the next step would be carried out; see `plan_step`."""
        return plan_step(
            [(group.meta, group.scores) for group in groups],
            self.spec.algorithm,
            max_tokens=self.spec.max_tokens,
            kl=kl,
            **self._limits(),
        )

    def _limits(self) -> dict[str, Any]:
        """What bounds and shapes every forward pass of this learner."""
        learner = self.spec.learner
        return {
            "ranks": self.spec.world_size,
            "micro_batch_tokens": learner.micro_batch_tokens,
            "logit_chunk_tokens": learner.logit_chunk_tokens,
            "cost": RowCost(self.facts.attention_work, self.facts.masked_attention),
            "share_prompts": self.facts.shares_prompts,
        }

    async def step(self, groups: Sequence[ScoredRef]) -> StepResult:
        """One step on these groups: `algorithm.updates_per_step` optimizer updates.

        A step without a group to train on, or an update whose gradient is not finite, changes
        nothing and says so in the result. Raises LearnerError after `learner.max_skipped_steps`
        non-finite updates in a row, and LostGroups, before anything is done, when objects are gone.
        """
        algorithm, kl, kl_a_token = self.spec.algorithm, None, None
        if algorithm.kl_coef > 0 and algorithm.kl_in == "reward":
            kl = await self._reference_kl(groups)
            tokens = sum(sum(group.meta.completion_tokens) for group in groups)
            kl_a_token = sum(kl.values()) / max(tokens, 1)
        plan = self.plan(groups, kl)
        if plan.micro_batches == 0:
            return pool(plan, [], self.version, self.nonfinite_in_a_row, kl_a_token)
        refs = {group.meta.group_id: group.ref for group in groups}
        calls, asked = [], []
        for rank, worker in enumerate(self._workers):
            updates = [shards[rank] for shards in plan.updates]
            ids = _ids_of([batch for shard in updates for batch in shard])
            asked.append(ids)
            calls.append(worker.step.remote(updates, [refs[group_id] for group_id in ids]))
        results = await self._all("an optimizer step", calls)
        _require_all(asked, [result.lost for result in results])
        applied = [update.applied for update in results[0].updates]
        for result in results:
            if [update.applied for update in result.updates] != applied:
                raise LearnerError(
                    f"the learner ranks disagree on the step: {results}", savable=False
                )
        self.version = results[0].steps_done
        limit = self.spec.learner.max_skipped_steps
        for moved in applied:
            self.nonfinite_in_a_row = 0 if moved else self.nonfinite_in_a_row + 1
            if self.nonfinite_in_a_row >= limit:
                raise LearnerError(
                    f"{self.nonfinite_in_a_row} optimizer updates in a row had a gradient that is "
                    f"not finite (learner.max_skipped_steps={limit}); the weights are those of "
                    f"step {self.version}. Lower learner.learning_rate, or look at the last "
                    "rollouts"
                )
        return pool(plan, results, self.version, self.nonfinite_in_a_row, kl_a_token)

    async def _reference_kl(self, groups: Sequence[ScoredRef]) -> dict[str, float]:
        """k1 of engine against reference, summed over every completion that has tokens, by id."""
        shards = score_batches([group.meta for group in groups], **self._limits())
        refs = {group.meta.group_id: group.ref for group in groups}
        asked = [_ids_of(batches) for batches in shards]
        calls = [
            worker.reference_kl.remote(batches, [refs[group_id] for group_id in ids])
            for worker, batches, ids in zip(self._workers, shards, asked, strict=True)
        ]
        results = await self._all("scoring with the reference", calls)
        _require_all(asked, [found if isinstance(found, tuple) else () for found in results])
        kl: dict[str, float] = {}
        for found in results:
            kl.update(found)
        return kl

    async def publish(self, remote: bool = False) -> WeightsInfo:
        """Publish the current weights; the version is the number of steps applied.

        The version published before stays available. What is older must have no readers any more:
        every engine has pulled the version after it, or was given up. remote: also through
        Ray's object store, for engines on other nodes.
        """
        keep = [] if self._published is None else [self._published]
        calls = [w.publish.remote(self.version, keep, remote) for w in self._workers]
        info = (await self._all("publishing the weights", calls))[0]
        self._published = self.version
        return info

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """The learner's log-probs of tokens 1..n-1 of a sequence, at temperature 1."""
        calls = [w.logprobs.remote(list(token_ids)) for w in self._workers]
        return (await self._all("scoring the probe", calls))[0]

    async def save(self, folder: str | Path, after_skipped: bool = False) -> None:
        """Write the learner's part of a checkpoint into an existing folder.

        after_skipped: also after an update that was not finite. It was left out and has changed
        nothing; the ranks look at the weights themselves, and write none that are not finite.
        Raises LearnerError otherwise.
        """
        if not after_skipped:
            self._require_finite()
        calls = [w.save.remote(str(folder)) for w in self._workers]
        await self._all("saving a checkpoint", calls)

    async def export(self, folder: str | Path) -> None:
        """Write the policy alone, as a Hugging Face folder; made if needed.

        Raises LearnerError when the last step was not finite.
        """
        self._require_finite()
        calls = [w.export.remote(str(folder)) for w in self._workers]
        await self._all("writing the model", calls)

    def _require_finite(self) -> None:
        if self.nonfinite_in_a_row:
            raise LearnerError("no checkpoint is written after a step that was not finite")

    async def load(self, folder: str | Path) -> int:
        """Restore a checkpoint; returns the optimizer steps it had done.

        Raises LearnerError, before anything is loaded, when the checkpoint is of another shape.
        """
        try:
            check_loadable(Path(folder), self.spec)
        except CheckpointError as error:
            raise LearnerError(str(error)) from error
        calls = [w.load.remote(str(folder)) for w in self._workers]
        self.version = (await self._all("loading a checkpoint", calls))[0]
        self.nonfinite_in_a_row = 0
        return self.version

    async def memory(self) -> list[dict[str, int]]:
        """Peak memory of every rank, in bytes."""
        calls = [w.memory.remote() for w in self._workers]
        return await self._all("reading the memory use", calls)

    def kill(self) -> None:
        """End all ranks at once."""
        _kill(self._workers)

    async def _all(self, what: str, calls: Sequence[Any]) -> list[Any]:
        return await _all(what, calls, self.spec.learner.step_timeout_s)


def _ids_of(batches: Sequence[MicroBatch]) -> list[str]:
    """The groups of these micro-batches, each once.

    Their references go to the rank in a list, so that they arrive as references: it fetches its own
    groups.
    """
    return list(dict.fromkeys(row.group_id for batch in batches for row in batch.rows))


def _require_all(asked: Sequence[Sequence[str]], lost: Sequence[Sequence[int]]) -> None:
    """Raise LostGroups when a rank could not have some of the groups that it was asked for."""
    gone = [ids[place] for ids, places in zip(asked, lost, strict=True) for place in places]
    if gone:
        raise LostGroups(list(dict.fromkeys(gone)))


async def _value(ref: Any) -> Any:
    return await ref


async def _all(what: str, calls: Sequence[Any], timeout_s: float) -> list[Any]:
    """The results of one call per rank, in order; LearnerError on the first failure or timeout."""
    tasks = [asyncio.ensure_future(_value(call)) for call in calls]
    try:
        _, waiting = await asyncio.wait(
            tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        errors = _errors(tasks)
        if errors and waiting:
            _, waiting = await asyncio.wait(waiting, timeout=GRACE_S)
            errors = _errors(tasks)
        if errors:
            rank = min(errors, key=lambda rank: _blame(errors[rank]))
            raise LearnerError(
                f"learner rank {rank} failed {what}: {_message(errors[rank])}",
                savable=not waiting and all(map(_is_alive, errors.values())),
            ) from errors[rank]
        if waiting:
            late = [rank for rank, task in enumerate(tasks) if task in waiting]
            raise LearnerError(
                f"learner rank(s) {late} did not finish {what} within {timeout_s} s;"
                " the end of each rank's log shows where it was",
                savable=False,
            )
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _errors(tasks: Sequence[asyncio.Future[Any]]) -> dict[int, BaseException]:
    errors = {}
    for rank, task in enumerate(tasks):
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None:
            errors[rank] = error
    return errors


def _is_alive(error: BaseException) -> bool:
    """Whether a rank that answered with this error is still there, with weights that are sound."""
    return isinstance(error, RayTaskError) and not isinstance(error.cause, NotFiniteError)


def _blame(error: BaseException) -> int:
    """0: a cause for sure (the process died); 1: the rank's own error; 2: likely a consequence."""
    if not isinstance(error, RayTaskError) and kind_of(error) == "infra":
        return 0
    return 2 if any(word in str(error).lower() for word in CONSEQUENCES) else 1


def _message(error: BaseException) -> str:
    """The rank's own error; a mistake in its program with the traceback."""
    if isinstance(error, RayTaskError) and error.cause is not None and kind_of(error) != "bug":
        return f"{type(error.cause).__name__}: {error.cause}"
    return words(error)


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        ray.kill(worker)
