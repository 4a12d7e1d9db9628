"""All learner ranks as one object, for the driver's asyncio program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from cohort.actors.records import ScoredRef, WeightsInfo
from cohort.learner.checkpoint import CheckpointError, check_loadable
from cohort.learner.gang import Gang
from cohort.learner.kept import KeptCopies
from cohort.learner.packing import MicroBatch, Packer, RowCost
from cohort.learner.plan import StepPlan, plan_step, score_batches
from cohort.learner.ranks import LearnerError, Ranks
from cohort.learner.results import StepResult, pool
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult
from cohort.learner.worker import LearnerWorker

R = TypeVar("R")
# How often in one call the ranks are started again; what fails so often would go on failing.
RESTARTS = 3


class LostGroups(LearnerError):
    """The objects of some groups are gone, with the machine that held them. Nothing was done."""

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(f"the completions of {', '.join(group_ids)} are gone")
        self.group_ids = tuple(group_ids)


class Learner:
    """The learner ranks. One call at a time; every call raises LearnerError on failure.

    When a rank dies or freezes, all ranks are started again, take the state that they kept after
    the step before, and the call is repeated; what it gives is bit for bit the same.

    Args:
        spec: Of any rank.
        ranks: Ready to train.
        facts: Of the model.
        gang: Starts the ranks again; None: their loss is an error.
        notify: Told what happens to them.

    Attributes:
        spec: Of any rank.
        facts: Of the model.
        version: Steps applied so far, which is the version of the weights.
        nonfinite_in_a_row: Updates since the last one whose gradient was finite.
        restarts: How often the ranks were started again.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        ranks: Ranks,
        facts: ModelFacts,
        gang: Gang | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.spec = spec
        self.facts = facts
        self.version = 0
        self.nonfinite_in_a_row = 0
        self.restarts = 0
        self._ranks = ranks
        self._gang = gang
        self._notify = notify
        self._published: int | None = None
        # What the ranks start again from: a copy, or else a checkpoint, or else the model folder.
        self._copies = None if gang is None else KeptCopies(gang, notify)
        self._loaded: str | None = None
        self._lost = False

    @classmethod
    async def start(
        cls,
        spec: LearnerSpec,
        actor_options: Sequence[Mapping[str, object]],
        timeout_s: float = 300.0,
        notify: Callable[[str], None] = print,
    ) -> Learner:
        """Create one actor per entry of `actor_options` and join them.

        Args:
            spec: Of any rank; the rank is filled in here.
            actor_options: Ray options of each rank's actor.
            timeout_s: Longest wait for the actors to be placed, and again for the model to load.
            notify: Told, for people, what happens to the ranks later.
        """
        if len(actor_options) != spec.world_size:
            raise ValueError(
                f"{len(actor_options)} actor options for {spec.world_size} learner ranks"
            )
        gang = Gang(spec, LearnerWorker, actor_options, timeout_s)
        try:
            ranks, facts = await gang.start()
        except BaseException:
            gang.kill()
            raise
        return cls(spec, ranks, facts, gang, notify)

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

    async def _lasting(self, call: Callable[[], Awaitable[R]]) -> R:
        """The answer to a call; where a rank is lost, that of ranks that were started again.

        Raises:
            LearnerError: The call failed otherwise, the ranks were lost again and again, or there
                is no copy of their state.
        """
        for attempt in range(RESTARTS + 1):
            try:
                if self._lost:
                    await self._start_again()
                return await call()
            except LearnerError as error:
                if not error.lost or self._gang is None or attempt == RESTARTS:
                    raise
                self._lost = True
                self._notify(f"{error}\nthe learner is started again, and repeats what it was at")
        raise AssertionError("the last attempt returns or raises")

    async def _start_again(self) -> None:
        """Start all ranks again, with the state from before the call that was interrupted."""
        assert self._gang is not None
        self.restarts += 1
        began = time.monotonic()
        self._ranks, _ = await self._gang.again()
        steps = [0]
        try:
            if self._copies is not None and (kept := self._copies.newest) is not None:
                steps = await self._ranks.all("taking its copy", LearnerWorker.restore, kept)
            elif self._loaded is not None:
                steps = await self._ranks.all(
                    "loading a checkpoint", LearnerWorker.load, self._loaded
                )
            elif self.version:
                raise LearnerError(
                    f"there is no copy of the {self.version} steps that the learner has done "
                    "(learner.keep_copy)"
                )
            if set(steps) != {self.version}:
                raise LearnerError(
                    f"the ranks came back with {steps} steps, and {self.version} are done"
                )
        except LearnerError as error:
            if error.lost:
                raise
            raise LearnerError(
                f"{error}; run.resume=true goes on from the newest checkpoint", savable=False
            ) from error
        self._lost = False
        self._notify(
            f"the learner goes on after step {self.version}, "
            f"{time.monotonic() - began:.1f} s after it was lost"
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
        arguments = [
            (shards, [refs[group_id] for group_id in ids])
            for shards, ids in zip(updates, asked, strict=True)
        ]

        async def kept_step() -> list[RankResult]:
            results = await self._ranks.each("an optimizer step", LearnerWorker.step, arguments)
            _require_all(asked, [result.lost for result in results])
            _require_agreement(results)
            if self._copies is not None and self.spec.learner.keep_copy:
                await self._copies.keep(self._ranks)
            return results

        results = await self._lasting(kept_step)
        applied = [update.applied for update in results[0].updates]
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
        arguments = [
            (batches, [refs[group_id] for group_id in ids])
            for batches, ids in zip(shards, asked, strict=True)
        ]
        results = await self._lasting(
            lambda: self._ranks.each(
                "scoring with the reference", LearnerWorker.reference_kl, arguments
            )
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
        published = await self._lasting(
            lambda: self._ranks.all(
                "publishing the weights", LearnerWorker.publish, self.version, keep, remote
            )
        )
        info = published[0]
        assert info is not None, "rank 0 returns where the weights are"
        self._published = self.version
        return info

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """The learner's log-probs of tokens 1..n-1 of a sequence, at temperature 1."""
        ids = list(token_ids)
        found = await self._lasting(
            lambda: self._ranks.all("scoring the probe", LearnerWorker.logprobs, ids)
        )
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
        await self._lasting(
            lambda: self._ranks.all("saving a checkpoint", LearnerWorker.save, str(folder))
        )

    async def save_behind(self, folder: str | Path) -> asyncio.Task[None] | None:
        """Begin to write what `save` writes, from the ranks' copies of their state, while the
        learner goes on. One at a time.

        Args:
            folder: On a file system that all ranks share.

        Returns:
            What ends when it is written, or raises LearnerError; None where there is no copy, and
            nothing was begun.

        Raises:
            LearnerError: As `save` does, before anything is left to the background.
        """
        if self._copies is None or self._copies.newest is None:
            return None
        await self._lasting(
            lambda: self._ranks.all("preparing a checkpoint", LearnerWorker.prepare_save)
        )
        return self._copies.write(str(folder))

    async def export(self, folder: str | Path) -> None:
        """Write the policy alone, as a Hugging Face folder; made if needed.

        Raises:
            LearnerError: The last update was not finite, or rank 0 could not write.
        """
        self._require_finite()
        await self._lasting(
            lambda: self._ranks.all("writing the model", LearnerWorker.export, str(folder))
        )

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
        steps = await self._lasting(
            lambda: self._ranks.all("loading a checkpoint", LearnerWorker.load, str(folder))
        )
        self.version = steps[0]
        self.nonfinite_in_a_row = 0
        self._loaded = str(folder)
        if self._copies is not None:
            self._copies.newest = None
        return self.version

    async def memory(self) -> list[dict[str, int]]:
        """Peak memory of every rank, in bytes."""
        return await self._ranks.all("reading the memory use", LearnerWorker.memory)

    def kill(self) -> None:
        """End all ranks at once; what they keep in shared memory goes with them."""
        self._ranks.kill()
        if self._gang is not None:
            self._gang.kill()


def _ids_of(batches: Sequence[MicroBatch]) -> list[str]:
    """The groups of these micro-batches, each once.

    Their references go to the rank in a list, so that they arrive as references: it fetches its own
    groups.
    """
    return list(dict.fromkeys(row.group_id for batch in batches for row in batch.rows))


def _require_agreement(results: Sequence[RankResult]) -> None:
    """Raise LearnerError unless all ranks have applied the same updates."""
    applied = [[update.applied for update in result.updates] for result in results]
    if any(flags != applied[0] for flags in applied):
        raise LearnerError(f"the learner ranks disagree on the step: {results}", savable=False)


def _require_all(asked: Sequence[Sequence[str]], lost: Sequence[Sequence[int]]) -> None:
    """Raise LostGroups when a rank could not have some of the groups that it was asked for."""
    gone = [ids[place] for ids, places in zip(asked, lost, strict=True) for place in places]
    if gone:
        raise LostGroups(list(dict.fromkeys(gone)))
