"""All learner ranks as one object, for the driver's asyncio program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray

from cohort.actors.records import ScoredRef, WeightsInfo
from cohort.learner.checkpoint import CheckpointError, check_loadable
from cohort.learner.packing import MicroBatch, Packer, RowCost
from cohort.learner.plan import StepPlan, plan_step, score_batches
from cohort.learner.ranks import LearnerError, Ranks
from cohort.learner.results import StepResult, pool
from cohort.learner.spec import LearnerSpec, ModelFacts
from cohort.learner.worker import LearnerWorker

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class LostGroups(LearnerError):
    """The objects of some groups are gone, with the machine that held them. Nothing was done."""

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(f"the completions of {', '.join(group_ids)} are gone")
        self.group_ids = tuple(group_ids)


class Learner:
    """The learner ranks. One call at a time; every call raises LearnerError on failure.

    Attributes:
        spec: Of any rank.
        facts: Of the model.
        version: Steps applied so far, which is the version of the weights.
        nonfinite_in_a_row: Updates since the last one whose gradient was finite.
    """

    def __init__(self, spec: LearnerSpec, ranks: Ranks, facts: ModelFacts) -> None:
        self.spec = spec
        self.facts = facts
        self.version = 0
        self.nonfinite_in_a_row = 0
        self._ranks = ranks
        self._published: int | None = None

    @classmethod
    async def start(
        cls,
        spec: LearnerSpec,
        actor_options: Sequence[Mapping[str, object]],
        timeout_s: float = 300.0,
    ) -> Learner:
        """Create one actor per entry of `actor_options` and join them.

        Args:
            spec: Of any rank; the rank is filled in here.
            actor_options: Ray options of each rank's actor.
            timeout_s: Longest wait for the actors to be placed, and again for the model to load.
        """
        if len(actor_options) != spec.world_size:
            raise ValueError(
                f"{len(actor_options)} actor options for {spec.world_size} learner ranks"
            )
        worker = ray.remote(LearnerWorker)
        handles = [
            worker.options(**options).remote(replace(spec, rank=rank))
            for rank, options in enumerate(actor_options)
        ]
        # To Ray's type hints a handle may be the class as well, so that editors know its methods.
        ranks = Ranks(cast("list[ActorHandle[LearnerWorker]]", handles), timeout_s)
        try:
            await ranks.ready()
            first = Ranks(ranks.handles[:1], timeout_s)
            [(address, port)] = await first.all("opening the rendezvous", LearnerWorker.rendezvous)
            facts = await ranks.all(
                "loading the model", LearnerWorker.setup, address, port, timeout_s
            )
        except BaseException:
            ranks.kill()
            raise
        ranks.timeout_s = spec.learner.step_timeout_s
        return cls(spec, ranks, facts[0])

    @property
    def packer(self) -> Packer:
        """What bounds and shapes every forward pass of this learner."""
        return Packer(
            ranks=self.spec.world_size,
            micro_batch_tokens=self.spec.learner.micro_batch_tokens,
            logit_chunk_tokens=self.spec.learner.logit_chunk_tokens,
            cost=RowCost(
                self.facts.attention_work, self.facts.masked_attention, self.facts.length_multiple
            ),
            share_prompts=self.facts.shares_prompts,
            whole_completions=self.spec.algorithm.judges_completions,
        )

    def plan(self, groups: Sequence[ScoredRef], kl: Mapping[str, float] | None = None) -> StepPlan:
        """How the next step would be carried out; see `plan_step`."""
        pairs = [(group.meta, group.scores) for group in groups]
        return plan_step(
            pairs, self.spec.algorithm, self.packer, max_tokens=self.spec.max_tokens, kl=kl
        )

    async def step(self, groups: Sequence[ScoredRef]) -> StepResult:
        """One step on these groups: `algorithm.updates_per_step` optimizer updates.

        A step without a group to train on, or an update whose gradient is not finite, changes
        nothing, and the result shows it.

        Raises:
            LearnerError: After `learner.max_skipped_steps` non-finite updates in a row.
            LostGroups: Before anything is done, when objects are gone.
        """
        algorithm, kl, kl_per_token = self.spec.algorithm, None, None
        if algorithm.kl_coef > 0 and algorithm.kl_in == "reward":
            kl = await self._reference_kl(groups)
            tokens = sum(sum(group.meta.completion_tokens) for group in groups)
            kl_per_token = sum(kl.values()) / max(tokens, 1)
        plan = self.plan(groups, kl)
        if plan.micro_batches == 0:
            return pool(plan, [], self.version, self.nonfinite_in_a_row, kl_per_token)
        refs = {group.meta.group_id: group.ref for group in groups}
        updates = [
            [shards[rank] for shards in plan.updates] for rank in range(self.spec.world_size)
        ]
        asked = [_ids_of([batch for shard in shards for batch in shard]) for shards in updates]
        results = await self._ranks.each(
            "an optimizer step",
            LearnerWorker.step,
            [
                (shards, [refs[group_id] for group_id in ids])
                for shards, ids in zip(updates, asked, strict=True)
            ],
        )
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
        return pool(plan, results, self.version, self.nonfinite_in_a_row, kl_per_token)

    async def _reference_kl(self, groups: Sequence[ScoredRef]) -> dict[str, float]:
        """k1 of engine against reference, summed over every completion that has tokens, by id."""
        shards = score_batches([group.meta for group in groups], self.packer)
        refs = {group.meta.group_id: group.ref for group in groups}
        asked = [_ids_of(batches) for batches in shards]
        results = await self._ranks.each(
            "scoring with the reference",
            LearnerWorker.reference_kl,
            [
                (batches, [refs[group_id] for group_id in ids])
                for batches, ids in zip(shards, asked, strict=True)
            ],
        )
        _require_all(asked, [found if isinstance(found, tuple) else () for found in results])
        kl: dict[str, float] = {}
        for found in results:
            if isinstance(found, dict):
                kl |= found
        return kl

    async def publish(self, remote: bool = False) -> WeightsInfo:
        """Publish the current weights; the version is the number of steps applied.

        The version published before stays available. What is older must have no readers any more:
        every engine has pulled the version after it, or was given up.

        Args:
            remote: Also through Ray's object store, for engines on other nodes.
        """
        keep = [] if self._published is None else [self._published]
        published = await self._ranks.all(
            "publishing the weights", LearnerWorker.publish, self.version, keep, remote
        )
        info = published[0]
        assert info is not None, "rank 0 returns where the weights are"
        self._published = self.version
        return info

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """The learner's log-probs of tokens 1..n-1 of a sequence, at temperature 1."""
        found = await self._ranks.all("scoring the probe", LearnerWorker.logprobs, list(token_ids))
        return found[0]

    async def save(self, folder: str | Path, after_skipped: bool = False) -> None:
        """Write the learner's part of a checkpoint into an existing folder.

        Args:
            folder: On a file system that all ranks share.
            after_skipped: Also after an update that was not finite. It was left out and has
                changed nothing; the ranks look at the weights themselves, and write none that are
                not finite.

        Raises:
            LearnerError: The last update was not finite, or a rank could not write.
        """
        if not after_skipped:
            self._require_finite()
        await self._ranks.all("saving a checkpoint", LearnerWorker.save, str(folder))

    async def export(self, folder: str | Path) -> None:
        """Write the policy alone, as a Hugging Face folder; made if needed.

        Raises:
            LearnerError: The last update was not finite, or rank 0 could not write.
        """
        self._require_finite()
        await self._ranks.all("writing the model", LearnerWorker.export, str(folder))

    def _require_finite(self) -> None:
        if self.nonfinite_in_a_row:
            raise LearnerError("no checkpoint is written after a step that was not finite")

    async def load(self, folder: str | Path) -> int:
        """Restore a checkpoint; returns the optimizer steps it had done.

        Raises:
            LearnerError: Before anything is loaded, when the checkpoint is of another shape.
        """
        try:
            check_loadable(Path(folder), self.spec)
        except CheckpointError as error:
            raise LearnerError(str(error)) from error
        steps = await self._ranks.all("loading a checkpoint", LearnerWorker.load, str(folder))
        self.version = steps[0]
        self.nonfinite_in_a_row = 0
        return self.version

    async def memory(self) -> list[dict[str, int]]:
        """Peak memory of every rank, in bytes."""
        return await self._ranks.all("reading the memory use", LearnerWorker.memory)

    def kill(self) -> None:
        """End all ranks at once."""
        self._ranks.kill()


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
