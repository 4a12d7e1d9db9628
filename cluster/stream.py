"""GroupStream: prompts in, scored groups out, oldest step first.

It admits prompts for a step, lets actors and reward workers turn them into scored groups in the
background, and hands them over step by step. How far ahead of the learner it may admit is the
whole difference between synchronous and overlapped training.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from cohort.actors.admission import oldest_version
from cohort.actors.dispatch import Outcome
from cohort.actors.pool import RolloutPool
from cohort.actors.records import (
    Failure,
    GroupMeta,
    Prompt,
    Request,
    ScoredRef,
    ScoreMeta,
)
from cohort.cluster.config import Config
from cohort.cluster.first_errors import FirstErrors
from cohort.cluster.requests import group_request
from cohort.cluster.waiting import Pending, pending_groups
from cohort.learner.credit import informative
from cohort.rewards.pool import Lost, MaybeScored, Part, RewardPool
from cohort.rewards.rates import NO_RATES, PassRates, PromptOutcome, RateHistory, outcome
from cohort.rewards.tasks import SampledPrompts

logger = logging.getLogger(__name__)

# Of one group, when its completions are lost with a machine before they are scored or trained.
MAX_GENERATIONS = 3


@dataclass(frozen=True)
class _Produced:
    """What became of one admitted prompt, and when its completions and its scores were there."""

    outcome: ScoredRef | Failure
    generated_at: float
    scored_at: float


class Memory(Protocol):
    """Keeps groups that were scored, for a run that goes on after this one has ended."""

    def recall(self, request: Request) -> ScoredRef | Failure | None:
        """What an earlier run got for this very request; None: it is to be generated."""
        ...

    def keep(self, request: Request, scored: ScoredRef) -> None:
        """A group was scored."""
        ...


class NoMemory:
    """Keeps nothing."""

    def recall(self, request: Request) -> None:
        pass

    def keep(self, request: Request, scored: ScoredRef) -> None:
        pass


@dataclass(frozen=True)
class Ahead:
    """Which prompts are drawn already for steps that are not trained yet.

    Attributes:
        steps: Step -> where its prompts begin, and how many were asked for.
        cursor: After all that was drawn, also in place of groups without gradient.
    """

    steps: dict[int, tuple[int, int]]
    cursor: int


@dataclass(frozen=True)
class Batch:
    """The scored groups of one step.

    Attributes:
        cursor: Where the next step's prompts begin.
        failed: The ids of the groups that failed, with their failures.
        generate_s, reward_s: Seconds that the learner waited for each.
        generation_wall_s: Seconds from admission to the last completion.
        refill_rounds: How often new prompts were drawn in place of groups without gradient.
        outcomes: Of the groups, in order.
        overlong: Prompts that were drawn, and left out as too long.
    """

    step: int
    cursor: int
    groups: list[ScoredRef]
    failed: tuple[tuple[str, Failure], ...]
    generate_s: float
    reward_s: float
    generation_wall_s: float
    refill_rounds: int = 0
    outcomes: tuple[PromptOutcome, ...] = ()
    overlong: int = 0

    @property
    def failures(self) -> list[Failure]:
        """Why the groups failed that did."""
        return [failure for _, failure in self.failed]


@dataclass
class _Step:
    """A step in flight. prompts: by group id, in the order of the tasks. first: where its prompts
    begin. cursor: where the next step's begin. oldest: the oldest weights to begin them with."""

    began: float
    first: int
    oldest: int = 0
    tasks: list[asyncio.Task[_Produced]] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    cursor: int = 0
    overlong: int = 0


class GroupStream:
    """Admits prompts, hands over scored groups.

    draw: (cursor, count, pass rates) -> that many prompts and the cursor after them; a pure
    function, so that a resumed run draws the same prompts. cursor: where the run stands in the
    training sequence. history: the pass rates of the run, kept for a task that is a Curriculum;
    None: the task is drawn without them. memory: keeps scored groups, and gives back those that
    were. ahead: what an earlier run had drawn for steps that it did not train.
    """

    def __init__(
        self,
        config: Config,
        draw: Callable[[int, int, PassRates], SampledPrompts],
        pool: RolloutPool,
        rewards: RewardPool,
        first_step: int,
        cursor: int,
        history: RateHistory | None = None,
        memory: Memory | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._config = config
        self._draw = draw
        self._pool = pool
        self._rewards = rewards
        self._steps: dict[int, _Step] = {}
        # Of the step that was handed over last: its prompts, and its oldest weights.
        self._handed: dict[str, Prompt] = {}
        self._handed_oldest = 0
        # Scores of single completions: for each group, its attempt and the calls.
        self._part_calls: dict[str, tuple[int, list[asyncio.Task[MaybeScored]]]] = {}
        # Groups that are generated and not scored yet.
        self._scoring: set[str] = set()
        self._errors = FirstErrors()
        self._next = first_step
        self.cursor = cursor
        # Of other counts than this config's nothing can be taken over.
        count = config.task.prompts_per_step
        self._ahead: dict[int, int] = {}
        if ahead is not None and all(drawn == count for _, drawn in ahead.steps.values()):
            self._ahead = {step: first for step, (first, _) in ahead.steps.items()}
            self.cursor = ahead.cursor
        self._memory: Memory = memory or NoMemory()
        self.history = history
        self.admitted = 0

    async def admit(self, until_step: int, skipped: int = 0) -> None:
        """Start on the prompts of every step up to and including `until_step`.

        Args:
            skipped: How many of the steps done so far have changed no weights.
        """
        staleness = self._config.actors.max_staleness
        while self._next <= until_step:
            step, self._next = self._next, self._next + 1
            # Drawn by an earlier run, or from where this one stands.
            first = self._ahead.pop(step, self.cursor)
            oldest = oldest_version(step, skipped, staleness)
            self._steps[step] = _Step(began=time.monotonic(), first=first, oldest=oldest)
            await self._begin(step, self._config.task.prompts_per_step, first)

    async def _begin(self, step: int, count: int, first: int) -> list[asyncio.Task[_Produced]]:
        """Start on so many more prompts of a step, from `first` on; the tasks of these."""
        rates = self.history.before(step) if self.history else NO_RATES
        sampled = self._draw(first, count, rates)
        begun = self._steps[step]
        if not begun.tasks:
            begun.cursor = sampled.cursor
        self.cursor = max(self.cursor, sampled.cursor)
        requests = [
            group_request(self._config, step, prompt, begun.oldest) for prompt in sampled.prompts
        ]
        self.admitted += len(requests) * self._config.task.group_size
        tasks = await self._produce(requests)
        begun.overlong += len(sampled.overlong)
        begun.prompts |= {request.group_id: request.prompt for request in requests}
        begun.tasks += tasks
        return tasks

    async def _produce(self, requests: list[Request]) -> list[asyncio.Task[_Produced]]:
        known = {r.group_id: found for r in requests if (found := self._memory.recall(r))}
        new = [request for request in requests if request.group_id not in known]
        generating = iter(await self._pool.generate(new, self._score_part) if new else ())
        return [
            asyncio.create_task(
                _known(known[request.group_id])
                if request.group_id in known
                else self._score(request, next(generating))
            )
            for request in requests
        ]

    async def again(self, batch: Batch, group_ids: Iterable[str]) -> Batch:
        """The batch handed over last, with these groups from memory or, from the same prompts and
        seeds, generated and scored again: what was there of them is lost."""
        requests = [
            group_request(self._config, batch.step, self._handed[group_id], self._handed_oldest)
            for group_id in group_ids
        ]
        produced = await asyncio.gather(*await self._produce(requests))
        new = {r.group_id: p.outcome for r, p in zip(requests, produced, strict=True)}
        groups, failed = _sorted(new)
        there = {group.meta.group_id: group for group in (*batch.groups, *groups)}
        gone = {name for name, _ in failed}
        names = [group.meta.group_id for group in batch.groups]
        return replace(
            batch,
            groups=[there[name] for name in names if name not in gone],
            failed=(*batch.failed, *failed),
        )

    def _score_part(self, group_id: str, attempt: int, completion: Part) -> None:
        """Have a completion scored while others of its group are still being generated."""
        before, tasks = self._part_calls.get(group_id, (attempt, []))
        if attempt != before:
            # The group was lost; what is generated anew may differ.
            _cancel(tasks)
            tasks = []
        tasks.append(self._rewards.score_part(f"{group_id} attempt {attempt}", completion))
        self._part_calls[group_id] = (attempt, tasks)

    async def _score(self, request: Request, generating: asyncio.Task[Outcome]) -> _Produced:
        """One group, generated and scored; generated again when it is lost before it is scored."""
        for left in reversed(range(MAX_GENERATIONS)):
            try:
                meta, group = await generating
                generated_at = time.monotonic()
                if isinstance(meta, Failure):
                    return _Produced(meta, generated_at, generated_at)
                assert group is not None, "it was generated"
                self._scoring.add(request.group_id)
                # Completions that were scored in one call have one task.
                _, calls = self._part_calls.get(request.group_id, (0, []))
                parts = await asyncio.gather(*dict.fromkeys(calls))
                known = [ref for ref in parts if ref is not None]
                scores, scored = await self._rewards.score(group, known)
            finally:
                self._scoring.discard(request.group_id)
                _, calls = self._part_calls.pop(request.group_id, (0, []))
                _cancel(calls)
            if not isinstance(scores, Lost) or not left:
                break
            logger.warning("group %s is generated again: %s", request.group_id, scores)
            (generating,) = await self._pool.generate([request], self._score_part)
        now = time.monotonic()
        if not isinstance(scores, ScoreMeta):
            return _Produced(scores, generated_at, now)
        assert scored is not None and isinstance(meta, GroupMeta)
        self._errors.say(scores)
        found = ScoredRef(meta, scores, scored)
        self._memory.keep(request, found)
        return _Produced(found, generated_at, now)

    async def take(self, step: int) -> Batch:
        """Wait for every group of a step. A group that failed is a Failure in the batch.

        With `algorithm.dynamic_sampling_rounds`, groups without gradient stay in the batch, and
        new prompts are drawn until there are as many with one, or the rounds are used up.
        """
        waited_from = time.monotonic()
        begun = self._steps[step]
        produced = await asyncio.gather(*begun.tasks)
        rounds = 0
        while rounds < self._config.algorithm.dynamic_sampling_rounds:
            missing = self._config.task.prompts_per_step - sum(map(self._informative, produced))
            if missing <= 0:
                break
            rounds += 1
            produced += await asyncio.gather(*await self._begin(step, missing, self.cursor))
        if not (self._ahead or self._steps.keys() - {step}):
            # Otherwise later steps have drawn in between.
            begun.cursor = self.cursor
        del self._steps[step]
        outcomes = (item.outcome for item in produced)
        groups, failed = _sorted(dict(zip(begun.prompts, outcomes, strict=True)))
        generated = max(item.generated_at for item in produced)
        scored = max(item.scored_at for item in produced)
        self._handed, self._handed_oldest = begun.prompts, begun.oldest
        return Batch(
            step=step,
            cursor=begun.cursor,
            groups=groups,
            failed=failed,
            generate_s=max(0.0, generated - waited_from),
            reward_s=max(0.0, scored - max(generated, waited_from)),
            generation_wall_s=max(1e-6, generated - begun.began),
            refill_rounds=rounds,
            outcomes=self._outcomes(step, groups),
            overlong=begun.overlong,
        )

    def _outcomes(self, step: int, groups: list[ScoredRef]) -> tuple[PromptOutcome, ...]:
        """How often each of a step's prompts was solved, written into the history."""
        bar = self._config.task.solved_at
        prompts = [(self._handed[group.meta.group_id], group.scores.totals) for group in groups]
        outcomes = tuple(outcome(p.row_id, p.source, totals, bar) for p, totals in prompts)
        if self.history:
            self.history.record(step, outcomes)
        return outcomes

    def _informative(self, produced: _Produced) -> bool:
        group, config = produced.outcome, self._config
        return isinstance(group, ScoredRef) and informative(
            group.meta, group.scores, config.algorithm
        )

    def ahead(self) -> Ahead:
        """What is drawn for steps that were not handed over yet."""
        count = self._config.task.prompts_per_step
        steps = {step: first for step, first in self._ahead.items()}
        steps |= {step: begun.first for step, begun in self._steps.items()}
        return Ahead({step: (first, count) for step, first in steps.items()}, self.cursor)

    @property
    def in_flight(self) -> int:
        """Completions admitted and not yet handed over."""
        return sum(len(s.prompts) for s in self._steps.values()) * self._config.task.group_size

    def pending(self) -> list[Pending]:
        """The groups that the oldest step in flight still waits for."""
        if not self._steps:
            return []
        step = self._steps[min(self._steps)]
        return pending_groups(dict(zip(step.prompts, step.tasks, strict=False)), self._scoring)

    def cancel(self) -> None:
        """Give up what is in flight; a resumed run generates it again, from the same seeds."""
        for step in self._steps.values():
            _cancel(step.tasks)
        for _, calls in self._part_calls.values():
            _cancel(calls)
        self._part_calls.clear()


async def _known(outcome: ScoredRef | Failure) -> _Produced:
    """What became of a prompt in an earlier run."""
    now = time.monotonic()
    return _Produced(outcome, now, now)


def _sorted(
    outcomes: dict[str, ScoredRef | Failure],
) -> tuple[list[ScoredRef], tuple[tuple[str, Failure], ...]]:
    """The groups that are there, and the failures of the others with their ids."""
    groups = [group for group in outcomes.values() if isinstance(group, ScoredRef)]
    failed = tuple((name, one) for name, one in outcomes.items() if isinstance(one, Failure))
    return groups, failed


def _cancel(tasks: Iterable[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
