"""The pipeline from prompts to batches: no sample lost, doubled or joined to another's reward."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from dataclasses import replace
from typing import Any

import pytest

from cohort.actors.records import Failure, GroupMeta, Prompt, RewardError, ScoredRef, ScoreMeta
from cohort.cluster.config import Config
from cohort.cluster.failures import TrainingError, check_failures
from cohort.cluster.observe.metrics import (
    Counters,
    StepTimes,
    logged_metrics,
    reward_errors,
    source_metrics,
    step_metrics,
)
from cohort.cluster.observe.metrics_file import STEP_KEYS
from cohort.cluster.stream import Batch, GroupStream
from cohort.learner.learner import StepResult
from cohort.learner.packing import Packer
from cohort.learner.plan import plan_step
from cohort.rewards.rates import PassRates, PromptOutcome, RateHistory
from cohort.rewards.tasks import SampledPrompts
from tests.harness import clock

G = 2


def config(**sections: Any) -> Config:
    task = {"prompts_per_step": 4, "group_size": G}
    return Config.model_validate({"model": {"path": "m"}, "task": task, **sections})


def draw(cursor: int, count: int, _: PassRates) -> SampledPrompts:
    prompts = tuple(Prompt(f"0-{i}", (1,), "p") for i in range(cursor, cursor + count))
    return SampledPrompts(prompts, (), cursor + count)


class Pool:
    """Finishes groups in random order; the reference carries the group's own name."""

    def __init__(self, lose: str = "") -> None:
        self.lose = lose
        self.seeds: dict[str, int] = {}
        self.version = 0

    async def generate(self, requests: list[Any], arrived: Any) -> list[asyncio.Task[Any]]:
        self.arrived = arrived
        return [asyncio.create_task(self._one(request)) for request in requests]

    async def _one(self, request: Any) -> Any:
        self.seeds[request.group_id] = request.sampling.seed
        version = self.version
        await asyncio.sleep(random.random() * 0.02)
        name = request.group_id
        if name == self.lose:
            return Failure("data", f"group {name}", "cannot be generated"), None
        ids = tuple(f"{name}/{i}" for i in range(G))
        meta = GroupMeta(name, 1, ids, (3, 5), (False, True), (version, version), "a", 0.1)
        return meta, f"tokens of {name}"


class Rewards:
    """A reward that is a function of the group's name, so that a wrong join shows."""

    async def score(self, group: str, _parts: Any = ()) -> Any:
        await asyncio.sleep(random.random() * 0.01)
        name = group.removeprefix("tokens of ")
        value = float(name.rsplit("-", 1)[1])
        totals = (value, value + 0.5)
        return ScoreMeta(name, totals, {"f": totals}, (), 0.01), f"scored {name}"


def stream_of(
    pool: Pool, rewards: Any = None, settings: Config | None = None, **options: Any
) -> GroupStream:
    where = {"first_step": 0, "cursor": 0, **options}
    return GroupStream(settings or config(), draw, pool, rewards or Rewards(), **where)  # type: ignore[arg-type]


def test_batches_hold_their_own_step_in_order_with_their_own_rewards() -> None:
    async def main() -> None:
        stream = stream_of(Pool())
        await stream.admit(2)
        assert stream.admitted == 24
        assert stream.in_flight == 24
        for step in range(3):
            batch = await stream.take(step)
            assert batch.cursor == 4 * (step + 1)
            names = [group.meta.group_id for group in batch.groups]
            assert names == [f"{step}:0-{i}" for i in range(4 * step, 4 * step + 4)]
            for group in batch.groups:
                name = group.meta.group_id
                assert group.scores.group_id == name
                assert group.ref == f"scored {name}"
                assert group.scores.totals[0] == float(name.rsplit("-", 1)[1])
        assert stream.in_flight == 0

    clock.run(main())


def test_a_resumed_stream_draws_the_same_prompts_with_the_same_seeds() -> None:
    async def seeds(first: int) -> dict[str, int]:
        pool = Pool()
        stream = stream_of(pool, first_step=first, cursor=4 * first)
        await stream.admit(3)
        for step in range(first, 4):
            await stream.take(step)
        return pool.seeds

    straight = clock.run(seeds(0))
    resumed = clock.run(seeds(2))
    assert resumed == {name: seed for name, seed in straight.items() if name[0] in "23"}
    assert len(set(straight.values())) == 16


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_stream_chooses_by_pass_rates_and_resumes_with_what_was_seen(staleness: int) -> None:
    settings = config(
        actors={"max_staleness": staleness}, task={"prompts_per_step": 4, "solved_at": 8}
    )

    def choosy(cursor: int, count: int, rates: PassRates) -> SampledPrompts:
        """Prompts whose numbers tell what was known."""
        solved = sum(rate.solved for rate in rates.sources.values())
        tries = sum(rate.scored for rate in rates.rows.values())
        prompts = tuple(
            Prompt(f"0-{tries}.{solved}-{i}", (1,), "p", source="odd" if i % 2 else "even")
            for i in range(cursor, cursor + count)
        )
        return SampledPrompts(prompts, (), cursor + count)

    async def run(first: int, history: RateHistory) -> tuple[dict[str, int], list[Any]]:
        pool, saved = Pool(), []
        stream = GroupStream(settings, choosy, pool, Rewards(), first, 4 * first, history)  # type: ignore[arg-type]
        for step in range(first, 6):
            await stream.admit(min(step + staleness, 5))
            batch = await stream.take(step)
            assert [item.row_id for item in batch.outcomes] == [
                group.meta.group_id.partition(":0-")[2] for group in batch.groups
            ]
            saved.append(json.loads(json.dumps(history.as_dict())))
        return pool.seeds, saved

    straight, saved = clock.run(run(0, RateHistory(staleness)))
    resumed, _ = clock.run(run(3, RateHistory.resumed(saved[2], staleness)))
    assert resumed == {name: seed for name, seed in straight.items() if name[0] in "345"}
    for step in range(6):
        known = max(0, step - staleness)
        tries = {name.split("-")[1].split(".")[0] for name in straight if name[0] == str(step)}
        assert tries == {str(known * 4 * G)}


def test_prompts_that_were_left_out_as_too_long_are_counted_in_their_step() -> None:
    def picky(cursor: int, count: int, rates: PassRates) -> SampledPrompts:
        """Every second row is too long."""
        kept = draw(cursor, count, rates).prompts
        return SampledPrompts(kept, kept, cursor + 2 * count)

    async def main() -> None:
        stream = GroupStream(config(), picky, Pool(), Rewards(), 0, 0)  # type: ignore[arg-type]
        await stream.admit(1)
        batches = [await stream.take(0), await stream.take(1)]
        assert [batch.overlong for batch in batches] == [4, 4]
        assert [batch.cursor for batch in batches] == [8, 16]
        assert stream.admitted == 8 * G

    clock.run(main())


def test_metrics_of_each_source() -> None:
    outcomes = (
        PromptOutcome("a", "easy", 2, 2, 1.0),
        PromptOutcome("b", "easy", 1, 0, 0.25),
        PromptOutcome("c", "hard", 0, 0, None),
        PromptOutcome("d", None, 2, 1, 0.5),
    )
    batch = Batch(0, 4, [], (), 0.0, 0.0, 1.0, outcomes=outcomes)
    assert source_metrics(batch) == {
        "source/easy/groups": 2,
        "source/easy/reward": 0.75,
        "source/easy/solved": 2 / 3,
        "source/hard/groups": 1,
    }


class OftenEqual(Rewards):
    """Only prompts whose number is a multiple of five get rewards that differ."""

    async def score(self, group: str, parts: Any = ()) -> Any:
        meta, name = await super().score(group, parts)
        if int(meta.group_id.rsplit("-", 1)[1]) % 5:
            meta = replace(meta, totals=(1.0, 1.0))
        return meta, name


@pytest.mark.parametrize(("rounds", "groups", "cursor"), [(0, 4, 4), (1, 7, 7), (9, 16, 16)])
def test_groups_without_gradient_are_replaced_in_bounded_rounds(
    rounds: int, groups: int, cursor: int
) -> None:
    async def main() -> None:
        settings = config(algorithm={"dynamic_sampling_rounds": rounds})
        stream = stream_of(Pool(), OftenEqual(), settings)
        await stream.admit(0)
        batch = await stream.take(0)
        ids = [group.meta.group_id for group in batch.groups]
        assert len(ids) == len(set(ids)) == groups
        assert sum(len(set(group.scores.totals)) > 1 for group in batch.groups) == -(-groups // 5)
        # A resumed run goes on behind what was drawn in their place.
        assert batch.cursor == stream.cursor == cursor
        assert stream.admitted == groups * G
        assert batch.refill_rounds <= rounds
        await stream.admit(1)
        following = await stream.take(1)
        assert following.groups[0].meta.group_id == f"1:0-{cursor}"

    clock.run(main())


@pytest.mark.parametrize("resumed_at", [0, 5])
def test_groups_that_only_a_length_penalty_tells_apart_are_replaced(resumed_at: int) -> None:
    """Equal rewards, lengths of 3 and 5 under a penalty: no signal, and every sample counted."""

    async def main() -> None:
        settings = config(
            algorithm={"dynamic_sampling_rounds": 9, "overlong_buffer": 1.0},
            actors={"max_tokens": 6},
        )
        stream = stream_of(
            Pool(lose=f"{resumed_at}:0-2"), OftenEqual(), settings, first_step=resumed_at
        )
        counters = Counters(group_size=G, trained=7, filtered=2, failed=1, admitted=10, before=10)
        for step in (resumed_at, resumed_at + 1):
            await stream.admit(step + 1)
            batch = await stream.take(step)
            assert batch.refill_rounds > 0
            plan = plan_step(
                [(group.meta, group.scores) for group in batch.groups],
                settings.algorithm, Packer(ranks=1, micro_batch_tokens=64), max_tokens=6,
            )  # fmt: skip
            assert plan.groups_trained == 4
            step_result = result(
                trained=plan.trained, filtered=plan.filtered, failed=plan.failed,
                groups_trained=plan.groups_trained, groups_filtered=plan.groups_filtered,
            )  # fmt: skip
            counters.add(batch, step_result)
            counters.check(stream.admitted, stream.in_flight)
            times = StepTimes(step=10.0, generate=4.0, reward=1.0, train=3.0, sync=1.5)
            metrics = step_metrics(batch, step_result, times, counters, 1, 0.0, {})
            share = plan.groups_filtered / len(batch.groups)
            assert metrics["reward/zero_variance_fraction"] == pytest.approx(share)
            assert share > 0.5

    asyncio.run(main())


def result(**changes: Any) -> StepResult:
    return StepResult(
        **{
            "version": 1, "applied": True, "updates": 1, "nonfinite_in_a_row": 0, "loss": 0.5,
            "grad_norm": 1.0, "learning_rate": 1e-6, "loss_scale": 1.0, "entropy": 1.0,
            "clip_fraction": 0.0, "k3_kl": 0.0, "engine_ratio": 1.0, "logprob_abs_max": 0.1,
            "corrected_fraction": 0.0, "reference_kl": 0.0, "tokens": 20, "seconds": 1.0,
            "trained": 4, "filtered": 2, "failed": 0, "groups_trained": 2, "groups_filtered": 1,
            "groups_failed": 0, "row_tokens": 30, "padded_tokens": 40, "micro_batches": 1,
            **changes,
        }
    )  # fmt: skip


def test_a_group_is_scored_while_others_are_still_generated() -> None:
    done = asyncio.Event()
    scored: list[str] = []

    class OneIsSlow(Pool):
        async def _one(self, request: Any) -> Any:
            result = await super()._one(request)
            if request.group_id == "0:0-2":
                # Ends only when all the other groups of the step have their scores.
                await asyncio.wait_for(done.wait(), 10)
            return result

    class Noting(Rewards):
        async def score(self, group: str, parts: Any = ()) -> Any:
            result = await super().score(group, parts)
            scored.append(group.removeprefix("tokens of "))
            if len(scored) == 3:
                done.set()
            return result

    async def main() -> Any:
        stream = stream_of(OneIsSlow(), Noting())
        await stream.admit(0)
        return await stream.take(0)

    assert len(clock.run(main()).groups) == 4
    assert scored[3] == "0:0-2"


def test_completions_are_scored_while_their_group_is_generated() -> None:
    """Those of an attempt that was lost do not count."""
    handed: list[Any] = []

    class Early(Rewards):
        def score_part(self, name: str, part: Any) -> asyncio.Task[Any]:
            async def scored() -> Any:
                scoring.set()
                return None if part == "c" else f"{part} scored, {name}"

            return asyncio.create_task(scored())

        async def score(self, group: str, parts: Any = ()) -> Any:
            handed.append(parts)
            return await super().score(group, parts)

    class Slow(Pool):
        async def _one(self, request: Any) -> Any:
            self.arrived(request.group_id, 0, "lost")
            for part in "abc":
                self.arrived(request.group_id, 1, part)
            await asyncio.wait_for(scoring.wait(), 10)
            return await super()._one(request)

    async def main() -> None:
        nonlocal scoring
        scoring = asyncio.Event()
        stream = stream_of(Slow(), Early(), config(task={"prompts_per_step": 1, "group_size": G}))
        await stream.admit(0)
        assert len((await stream.take(0)).groups) == 1

    scoring = asyncio.Event()
    clock.run(main())
    name = "0:0-0 attempt 1"
    assert handed == [[f"a scored, {name}", f"b scored, {name}"]]


def test_an_error_is_shown_once_for_each_function_and_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Rewards):
        async def score(self, group: str, parts: Any = ()) -> Any:
            meta, name = await super().score(group, parts)
            errors = tuple(
                RewardError("f", f"c/{i}", cause, f"Traceback of {cause}")
                for cause in ("raised", "timeout")
                for i in range(2)
            )
            return replace(meta, errors=errors), name

    async def main() -> Batch:
        stream = stream_of(Pool(), Failing())
        await stream.admit(1)
        await stream.take(0)
        return await stream.take(1)

    with caplog.at_level(logging.WARNING):
        batch = clock.run(main())
    assert sorted("timeout" in text for text in caplog.messages) == [False, True]
    assert any("f (raised) on c/0" in text and "Traceback" in text for text in caplog.messages)
    counts = logged_metrics(batch)
    assert counts == {"reward_errors/f/raised": 8, "reward_errors/f/timeout": 8}


def test_what_functions_log_is_pooled_over_the_step() -> None:
    class Logging(Rewards):
        async def score(self, group: str, parts: Any = ()) -> Any:
            meta, name = await super().score(group, parts)
            number = float(meta.group_id.rsplit("-", 1)[1])
            more: dict[str, Any] = {"f/late": (1.0, 1.0)} if number == 3 else {}
            return (
                replace(
                    meta,
                    parts={"f/part": (number, None), **more},
                    metrics={"f/calls": (1.0,) * int(number)},
                    sample_s=(number, number / 10),
                ),
                name,
            )

    async def main() -> Batch:
        stream = stream_of(Pool(), Logging())
        await stream.admit(0)
        return await stream.take(0)

    batch = clock.run(main())
    times = StepTimes(step=10.0, generate=4.0, reward=1.0, train=3.0, sync=1.5)
    metrics = step_metrics(batch, result(), times, Counters(), version=5, probe_gap=0.0, actors={})
    assert metrics["reward_part/f/part"] == 1.5
    assert metrics["reward_part/f/late"] == 1.0
    assert metrics["reward_metric/f/calls"] == 1.0
    assert metrics["reward/error_rate"] == 0.0
    # 0, 0, 0.1, 0.2, 0.3, 1, 2, 3
    assert metrics["time/reward_p50"] == 0.2
    assert metrics["time/reward_p99"] == metrics["time/reward_max"] == 3.0


def test_a_group_that_failed_is_counted_not_dropped() -> None:
    async def main() -> Any:
        stream = stream_of(Pool(lose="0:0-2"))
        await stream.admit(0)
        return stream, await stream.take(0)

    stream, batch = clock.run(main())
    assert [group.meta.group_id for group in batch.groups] == ["0:0-0", "0:0-1", "0:0-3"]
    assert len(batch.failures) == 1
    counters = Counters(group_size=G)
    counters.add(batch, result())
    assert counters.failed == G
    assert counters.admitted == stream.admitted == 8
    counters.check(stream.admitted, stream.in_flight)
    with pytest.raises(AssertionError, match="do not add up"):
        counters.check(stream.admitted + 1, stream.in_flight)


def test_counters_go_on_after_a_resume() -> None:
    saved = Counters(admitted=64, trained=40, filtered=24, group_size=8).as_dict()
    counters = Counters.resumed(saved)
    counters.check(admitted_now=0, in_flight=0)
    assert counters.trained == 40


def test_metrics_of_a_step_are_pooled_over_completions() -> None:
    async def main() -> Any:
        stream = stream_of(Pool())
        await stream.admit(0)
        return await stream.take(0)

    batch = clock.run(main())
    times = StepTimes(step=10.0, generate=4.0, reward=1.0, train=3.0, sync=1.5)
    counters = Counters(group_size=G)
    counters.add(batch, result(trained=8, filtered=0))
    metrics = step_metrics(batch, result(), times, counters, version=5, probe_gap=0.01, actors={})
    assert set(STEP_KEYS) <= set(metrics)
    # Rewards 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5.
    assert metrics["reward/mean"] == metrics["reward/f"] == 1.75
    assert metrics["reward/std"] == pytest.approx(1.1456439)
    assert metrics["reward/zero_variance_fraction"] == 0
    assert metrics["rollout/completion_tokens"] == 4
    assert metrics["rollout/truncated_fraction"] == 0.5
    assert metrics["time/wait"] == pytest.approx(0.5)
    # The step trained version 4 and made version 5; the completions are of version 0.
    assert metrics["async/staleness_max"] == 4
    assert metrics["samples/trained"] == 8


def test_reward_errors_are_a_share_of_scores_with_an_example() -> None:
    error = RewardError("f", "c/0", "raised", "boom")
    meta = GroupMeta("g", 1, ("c/0", "c/1"), (1, 1), (False, False), (0, 0), "a", 0.1)
    scores = ScoreMeta("g", (None, 1.0), {"f": (None, 1.0)}, (error,), 0.1)

    class One:
        groups = [ScoredRef(meta, scores, None)]
        failures: list[Failure] = []

    share, example = reward_errors(One())  # type: ignore[arg-type]
    assert share == 0.5
    assert example == "f raised: boom"


@pytest.mark.parametrize("cause", ["raised", "wrong_length", "wrong_type", "timeout", "died"])
def test_too_many_failed_scores_end_the_run_with_the_first_one(cause: Any) -> None:
    error = RewardError("f", "c/0", cause, "what happened")
    meta = GroupMeta("g", 1, ("c/0", "c/1"), (1, 1), (False, False), (0, 0), "a", 0.1)
    scores = ScoreMeta("g", (None, 1.0), {"f": (None, 1.0)}, (error,), 0.1)
    batch = Batch(3, 4, [ScoredRef(meta, scores, None)], (), 1.0, 0.1, 1.0)
    check_failures(config(rewards={"max_error_rate": 0.5}), batch)
    with pytest.raises(TrainingError, match=rf"step 3: 50% .*max_error_rate.* f {cause}: what"):
        check_failures(config(rewards={"max_error_rate": 0.4}), batch)


def test_a_step_without_any_group_ends_the_run_with_the_reason() -> None:
    failure = Failure("data", "rollout-0 failed", "out of tokens")
    batch = Batch(3, 4, [], (("3:0-0", failure),), 1.0, 0.1, 1.0)
    with pytest.raises(TrainingError, match=r"none of the 1 groups .* out of tokens"):
        check_failures(config(), batch)
