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
from typing import Any

from cohort.actors.pool import RolloutPool
from cohort.actors.records import (
    Failure,
    GroupMeta,
    Prompt,
    Request,
    SamplingSpec,
    ScoredRef,
    ScoreMeta,
    derive_seed,
)
from cohort.cluster.config import Config
from cohort.learner.credit import informative
from cohort.rewards.pool import Lost, RewardPool
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


@dataclass(frozen=True)
class Batch:
    """The scored groups of one step.

    cursor: where the next step's prompts begin. generate_s, reward_s: seconds the learner waited
    for each. generation_wall_s: from admission to the last completion. refill_rounds: how often
    new prompts were drawn in place of groups without gradient. outcomes: of the groups, in order.
    overlong: prompts that were drawn, and left out as too long.
    """

    step: int
    cursor: int
    groups: list[ScoredRef]
    failures: list[Failure]
    generate_s: float
    reward_s: float
    generation_wall_s: float
    refill_rounds: int = 0
    outcomes: tuple[PromptOutcome, ...] = ()
    overlong: int = 0


@dataclass
class _Step:
    """A step in flight. prompts: by group id. cursor: where the next step's prompts begin."""

    began: float
    tasks: list[asyncio.Task[_Produced]] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    cursor: int = 0
    overlong: int = 0


def group_request(config: Config, step: int, prompt: Prompt) -> Request:
    """What a step asks for a prompt: a group, whose seed is its own in every run and step."""
    sampling = SamplingSpec(
        max_tokens=config.actors.max_tokens,
        temperature=config.actors.temperature,
        n=config.task.group_size,
        seed=derive_seed(config.run.seed, "rollout", step, prompt.id),
    )
    return Request(f"{step}:{prompt.id}", prompt, sampling, step=step)


class GroupStream:
    """Admits prompts, hands over scored groups.

    draw: (cursor, count, pass rates) -> that many prompts and the cursor after them; a pure
    function, so that a resumed run draws the same prompts. cursor: where the run stands in the
    training sequence. history: the pass rates of the run, kept for a task that is a Curriculum;
    None: the task is drawn without them.
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
    ) -> None:
        self._config = config
        self._draw = draw
        self._pool = pool
        self._rewards = rewards
        self._steps: dict[int, _Step] = {}
        # The prompts of the step that was handed over last.
        self._handed: dict[str, Prompt] = {}
        # Scores of single completions: for each group, its attempt and the calls.
        self._part_calls: dict[str, tuple[int, list[asyncio.Task[Any]]]] = {}
        self._errors_shown: set[tuple[str, str]] = set()
        self._next = first_step
        self.cursor = cursor
        self.history = history
        self.admitted = 0

    async def admit(self, until_step: int) -> None:
        """Start on the prompts of every step up to and including `until_step`."""
        while self._next <= until_step:
            step, self._next = self._next, self._next + 1
            self._steps[step] = _Step(began=time.monotonic())
            await self._begin(step, self._config.task.prompts_per_step)
            self._steps[step].cursor = self.cursor

    async def _begin(self, step: int, count: int) -> list[asyncio.Task[_Produced]]:
        """Start on so many more prompts of a step; the tasks of these."""
        rates = self.history.before(step) if self.history else NO_RATES
        sampled = self._draw(self.cursor, count, rates)
        self.cursor = sampled.cursor
        requests = [group_request(self._config, step, prompt) for prompt in sampled.prompts]
        self.admitted += len(requests) * self._config.task.group_size
        tasks = await self._produce(requests)
        begun = self._steps[step]
        begun.overlong += len(sampled.overlong)
        begun.prompts |= {request.group_id: request.prompt for request in requests}
        begun.tasks += tasks
        return tasks

    async def _produce(self, requests: list[Request]) -> list[asyncio.Task[_Produced]]:
        generating = await self._pool.generate(requests, self._score_part)
        return [
            asyncio.create_task(self._score(request, task))
            for request, task in zip(requests, generating, strict=True)
        ]

    async def again(self, batch: Batch, group_ids: Iterable[str]) -> Batch:
        """The batch handed over last, with these groups generated and scored again, from the same
        prompts and seeds: what was there of them is lost."""
        requests = [
            group_request(self._config, batch.step, self._handed[group_id])
            for group_id in group_ids
        ]
        produced = await asyncio.gather(*await self._produce(requests))
        new = {r.group_id: p.outcome for r, p in zip(requests, produced, strict=True)}
        groups = [new.get(group.meta.group_id, group) for group in batch.groups]
        return replace(
            batch,
            groups=[group for group in groups if isinstance(group, ScoredRef)],
            failures=[*batch.failures, *(g for g in groups if isinstance(g, Failure))],
        )

    def _score_part(self, group_id: str, attempt: int, completion: Any) -> None:
        """Have a completion scored while others of its group are still being generated."""
        before, tasks = self._part_calls.get(group_id, (attempt, []))
        if attempt != before:
            # The group was lost; what is generated anew may differ.
            _cancel(tasks)
            tasks = []
        tasks.append(self._rewards.score_part(f"{group_id} attempt {attempt}", completion))
        self._part_calls[group_id] = (attempt, tasks)

    async def _score(self, request: Request, generating: asyncio.Task[Any]) -> _Produced:
        """One group, generated and scored; generated again when it is lost before it is scored."""
        for left in reversed(range(MAX_GENERATIONS)):
            try:
                meta, group = await generating
                generated_at = time.monotonic()
                if isinstance(meta, Failure):
                    return _Produced(meta, generated_at, generated_at)
                assert isinstance(meta, GroupMeta)
                # Completions that were scored in one call have one task.
                _, calls = self._part_calls.get(request.group_id, (0, []))
                parts = await asyncio.gather(*dict.fromkeys(calls))
                known = [ref for ref in parts if ref is not None]
                scores, scored = await self._rewards.score(group, known)
            finally:
                _, calls = self._part_calls.pop(request.group_id, (0, []))
                _cancel(calls)
            if not isinstance(scores, Lost) or not left:
                break
            logger.warning("group %s is generated again: %s", request.group_id, scores)
            (generating,) = await self._pool.generate([request], self._score_part)
        now = time.monotonic()
        if not isinstance(scores, ScoreMeta):
            return _Produced(scores, generated_at, now)
        assert scored is not None
        self._show_errors(scores)
        return _Produced(ScoredRef(meta, scores, scored), generated_at, now)

    def _show_errors(self, scores: ScoreMeta) -> None:
        """The first error of every kind, in its own words; metrics count all of them."""
        for error in scores.errors:
            if (error.function, error.cause) not in self._errors_shown:
                self._errors_shown.add((error.function, error.cause))
                logger.warning(
                    "reward function %s (%s) on %s; further errors of this kind are only counted:"
                    "\n%s",
                    error.function,
                    error.cause,
                    error.completion_id,
                    error.message,
                )

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
            produced += await asyncio.gather(*await self._begin(step, missing))
        if self._next == step + 1:
            # Otherwise later steps have drawn in between: a resumed run begins with theirs, and
            # sees again what was drawn here.
            begun.cursor = self.cursor
        del self._steps[step]
        groups = [item.outcome for item in produced if isinstance(item.outcome, ScoredRef)]
        generated = max(item.generated_at for item in produced)
        scored = max(item.scored_at for item in produced)
        self._handed = begun.prompts
        return Batch(
            step=step,
            cursor=begun.cursor,
            groups=groups,
            failures=[item.outcome for item in produced if isinstance(item.outcome, Failure)],
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

    @property
    def in_flight(self) -> int:
        """Completions admitted and not yet handed over."""
        return sum(len(s.prompts) for s in self._steps.values()) * self._config.task.group_size

    def cancel(self) -> None:
        """Give up what is in flight; a resumed run generates it again, from the same seeds."""
        for step in self._steps.values():
            _cancel(step.tasks)
        for _, calls in self._part_calls.values():
            _cancel(calls)
        self._part_calls.clear()


def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
