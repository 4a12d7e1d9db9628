"""The Python API: the parts of a run, started and ready, for a loop of one's own.

`cohort train` runs `cluster/loop.py` on the same parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.actors.records import Failure, Group, GroupMeta, Prompt, ScoredRef
from cohort.cluster.commands.evaluate import evaluate as run_evaluation
from cohort.cluster.commands.train import run_training
from cohort.cluster.config import Config
from cohort.cluster.evaluation import Evaluation
from cohort.cluster.failures import check_failures
from cohort.cluster.launch import Services
from cohort.cluster.launch import launch as launch_services
from cohort.cluster.observe.console import Console
from cohort.cluster.observe.stats import mean
from cohort.cluster.prepare import Prepared, passing_logs, prepare
from cohort.cluster.publishing import Publisher
from cohort.cluster.ray_start import check_start
from cohort.cluster.requests import group_request
from cohort.cluster.stream import Batch
from cohort.learner.learner import Learner
from cohort.rewards.tasks import SampledPrompts

if TYPE_CHECKING:
    from ray import ObjectRef


def train(config: Config) -> int:
    """Train as `cohort train` does, with its run directory, checkpoints and signals.

    Returns:
        The exit code: 0 when all steps are done, 128 + a signal's number when that stopped the run;
        what was trained is saved then.

    Raises:
        CohortError: the run cannot start or go on.

    Example:
        config = cohort.load_config("gsm8k.yaml", ["run.steps=100"])
        cohort.train(config)
    """
    return asyncio.run(run_training(config))


def evaluate(config: Config, model: str | Path | None = None) -> Evaluation:
    """Score a model on the task's held-out prompts, greedily and sampled, as `cohort eval` does.

    Args:
        model: a Hugging Face folder to score in place of `model.path`.

    Raises:
        CohortError: the evaluation cannot start, or a group could not be generated or scored.

    Example:
        result = cohort.evaluate(config, "runs/addition/model")
        print(result.greedy_solved, result.pass_at[4])
    """
    folder = None if model is None else Path(model)
    with Console(1, "plain") as console:
        return asyncio.run(run_evaluation(config, folder, console))


@dataclass(frozen=True)
class Generated:
    """A group that was generated, or the failure in its place. ref: to the completions, which stay
    in Ray's object store."""

    meta: GroupMeta | Failure
    ref: ObjectRef[Group] | None


class Scored(list[ScoredRef]):
    """Scored groups, as `Learner.step` takes them. failures: of the groups that are not there."""

    def __init__(self, groups: Iterable[ScoredRef], failures: Iterable[Failure] = ()) -> None:
        super().__init__(groups)
        self.failures = list(failures)

    @property
    def mean_reward(self) -> float:
        """Mean total reward of the completions that have one; NaN if none has."""
        return mean(total for group in self for total in group.scores.totals)


class Session:
    """Engines, reward workers and a learner of one config, started by `cohort.launch`.

    config: of the run. learner: its `step(scored)` is one optimizer step.
    """

    def __init__(self, prepared: Prepared, actors: Services) -> None:
        self.config = prepared.config
        self.learner: Learner = actors.learner
        self._actors = actors
        self._publisher = Publisher.of(prepared, actors)
        self._prepared = prepared
        self._cursors = [0]

    def prompts(self, step: int) -> list[Prompt]:
        """The `task.prompts_per_step` prompts that training would take for this step.

        A curriculum chooses them without the pass rates of earlier steps, which only `cohort train`
        keeps.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more (got {step})")
        while len(self._cursors) < step + 2:
            self._cursors.append(self._sample(self._cursors[-1]).cursor)
        return list(self._sample(self._cursors[step]).prompts)

    def _sample(self, cursor: int) -> SampledPrompts:
        return self._prepared.draw(cursor, self.config.task.prompts_per_step)

    async def publish(self) -> float:
        """Have every engine load the learner's weights, and prove that it did.

        Returns:
            The largest gap between learner and engines on a fixed sequence, nats a token.
        """
        return (await self._publisher.publish()).gap

    async def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """`task.group_size` completions of each prompt, from the weights published last.

        The seeds come from the config's, the number of steps done and the prompt: the same prompt
        gets the same completions until the learner has made another step.
        """
        step = self.learner.version
        requests = [group_request(self.config, step, prompt) for prompt in prompts]
        made = await asyncio.gather(*await self._actors.pool.generate(requests))
        return [Generated(meta, ref) for meta, ref in made]

    async def score(self, groups: Sequence[Generated]) -> Scored:
        """Score groups with the functions of `rewards.functions`, in the reward workers.

        Raises:
            TrainingError: more of them failed than `rewards.max_error_rate` allows.
        """
        if not groups:
            return Scored([])
        results = await asyncio.gather(*map(self._score, groups))
        scored = Scored(
            [result for result in results if isinstance(result, ScoredRef)],
            [result for result in results if isinstance(result, Failure)],
        )
        step = self.learner.version
        failed = tuple((failure.what, failure) for failure in scored.failures)
        check_failures(self.config, Batch(step, 0, list(scored), failed, 0.0, 0.0, 0.0))
        return scored

    async def _score(self, group: Generated) -> ScoredRef | Failure:
        if isinstance(group.meta, Failure):
            return group.meta
        assert group.ref is not None
        scores, ref = await self._actors.rewards.score(group.ref)
        if isinstance(scores, Failure):
            return scores
        assert ref is not None
        return ScoredRef(group.meta, scores, ref)


@asynccontextmanager
async def launch(config: Config) -> AsyncIterator[Session]:
    """Start engines, reward workers and the learner; end them when the block is left.

    Nothing is written to `run.dir`. Engines serve nothing before the first `publish`.

    Raises:
        CohortError: what is missing or wrong, with the key to change.

    Example:
        async with cohort.launch(config) as c:
            await c.publish()
            for step in range(config.run.steps):
                scored = await c.score(await c.generate(c.prompts(step)))
                result = await c.learner.step(scored)
                await c.publish()
                print(step, scored.mean_reward, result.loss)
    """
    prepared = prepare(config)
    check_start(config)
    with passing_logs("launch") as log_dir, Console(config.run.steps, "plain") as console:
        async with launch_services(prepared, console, log_dir) as actors:
            yield Session(prepared, actors)
