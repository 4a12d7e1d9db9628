"""What the driver does with the ranks' answers, without any rank."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cohort.learner import ranks
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.grpo import LossStats
from cohort.learner.learner import Learner, LearnerError
from cohort.learner.optimizer import client_optimizer, deepspeed_config, lr_at
from cohort.learner.packing import Packer, Segment
from cohort.learner.plan import plan_step
from cohort.learner.ranks import Ranks, results_of
from cohort.learner.results import pool
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult, UpdateResult
from tests.learner.helpers import metas, scored_group, scored_ref


def test_learning_rate_starts_above_zero_and_stays_at_its_peak() -> None:
    learner = LearnerConfig(learning_rate=8.0, warmup_steps=4)
    assert [lr_at(update, learner, 10) for update in (1, 2, 3, 4, 5, 100)] == [2, 4, 6, 8, 8, 8]
    for warmup in (0, 1):
        assert lr_at(1, learner.model_copy(update={"warmup_steps": warmup}), 10) == 8.0


def test_learning_rate_falls_to_its_last_share() -> None:
    learner = LearnerConfig(learning_rate=8.0, warmup_steps=2, lr_schedule="linear", lr_final=0.25)
    assert [lr_at(update, learner, 6) for update in range(1, 8)] == [4, 8, 6.5, 5, 3.5, 2, 2]
    cosine = learner.model_copy(update={"lr_schedule": "cosine"})
    found = [lr_at(update, cosine, 6) for update in range(1, 8)]
    # 2 + 6 (1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4, 1.
    assert found == pytest.approx([4, 8, 7.1213203, 5, 2.8786797, 2, 2])
    # A run that is nothing but warm-up, or shorter than it.
    assert lr_at(2, learner, 2) == 8.0
    assert lr_at(1, learner.model_copy(update={"warmup_steps": 5}), 1) == pytest.approx(1.6)


def test_metrics_pool_over_unequal_ranks() -> None:
    """Means over all tokens, not means of the ranks' means."""
    plan = plan_step(
        [metas(scored_group("a", [0.0, 1.0], [2, 3]))],
        AlgorithmConfig(),
        Packer(ranks=2, micro_batch_tokens=64),
        max_tokens=8,
    )
    first = LossStats(10, 0.25, 1.0, 20.0, 0.5, 0.1)
    second = LossStats(90, 0.5, 4.0, 90.0, 1.5, 0.7)
    results = [
        RankResult(0, (UpdateResult(first, True, 3.0, 1e-6),), 5, 1.0),
        RankResult(1, (UpdateResult(second, True, 3.0, 1e-6),), 5, 2.0),
    ]
    found = pool(plan, results, version=5, nonfinite_in_a_row=0)
    assert (found.loss, found.tokens, found.seconds) == (0.75, 100, 2.0)
    assert found.clip_fraction == pytest.approx(0.05)
    assert found.entropy == pytest.approx(1.1)
    assert found.k3_kl == pytest.approx(0.02)
    assert found.logprob_abs_max == 0.7
    assert (found.grad_norm, found.version, found.applied) == (3.0, 5, True)


class Rank:
    """The learner's only rank: each call answers like a rank, and is written down."""

    def __init__(self, kl: dict[str, float] | None = None) -> None:
        self.kl = kl or {}
        self.finite = True
        self.planned: dict[str, Segment] = {}
        self.calls: list[str] = []
        self.done = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *given: self._answer(name, *given))

    async def _answer(self, name: str, *given: Any) -> Any:
        self.calls.append(name)
        if name == "reference_kl":
            ids = [segment.completion_id for batch in given[0] for segment in batch.segments]
            return {i: self.kl[i] for i in ids}
        if name == "step":
            segments = [s for update in given[0] for batch in update for s in batch.segments]
            self.planned = {segment.completion_id: segment for segment in segments}
            self.done += self.finite
            norm = 1.0 if self.finite else math.nan
            update = UpdateResult(LossStats(tokens=9, loss=norm), self.finite, norm, 1e-6)
            return RankResult(0, (update,), self.done, 0.1)
        return None


def group_of(rank: Rank, **algorithm: Any) -> Learner:
    spec = LearnerSpec(
        model_path="none", dtype="float32", learner=LearnerConfig(),
        algorithm=AlgorithmConfig(**algorithm), temperature=1.0, max_tokens=32, rank=0,
        world_size=1, device="cpu", threads=1, seed=0, shm_dir="none",
    )  # fmt: skip
    return Learner(spec, Ranks([rank], 60.0), ModelFacts(1, 1e-3, True, True))


@pytest.mark.parametrize(
    ("keys", "whole"),
    [
        ({}, False),
        ({"preset": "gspo"}, True),
        ({"sequence_mask": (0.9, 1.1)}, True),
        ({"negative_mask": 0.5}, True),
    ],
)
def test_completions_are_kept_whole_where_their_loss_needs_it(
    keys: dict[str, Any], whole: bool
) -> None:
    assert group_of(Rank(), **keys).packer.whole_completions == whole


def test_a_kl_in_the_reward_comes_off_after_the_filter() -> None:
    """Its noise makes no equal rewards differ, and it is reported."""
    kl = {"a/0": 0.02, "a/1": 0.03, "b/0": 0.5, "b/1": -0.5, "b/2": 0.0}
    rank = Rank(kl)
    keys: dict[str, Any] = dict(kl_coef=0.2, kl_in="reward", kl_estimator="k1", scale="none")
    group = group_of(rank, **keys)
    refs = [
        scored_ref(scored_group("a", [1.0, 1.0], [3, 4])),
        scored_ref(scored_group("b", [0.0, 1.0, None, None], [3, 4, 2, 0])),
    ]
    result = asyncio.run(group.step(refs))
    assert (result.trained, result.filtered, result.failed) == (2, 2, 2)
    # Rewards of -0.1 and 1.1.
    found = {name: segment.advantage for name, segment in rank.planned.items()}
    assert found == pytest.approx({"b/0": -0.6, "b/1": 0.6})
    assert result.reference_kl == pytest.approx(0.05 / 16)
    assert refs[1].scores.totals == (0.0, 1.0, None, None)
    nothing = asyncio.run(group.step(refs[:1]))
    assert (nothing.applied, nothing.filtered) == (False, 2)


def test_after_a_step_that_was_not_finite_nothing_is_saved(tmp_path: Path) -> None:
    rank = Rank()
    group = group_of(rank)
    refs = [scored_ref(scored_group("a", [0.0, 1.0], [3, 4]))]
    rank.finite = False
    result = asyncio.run(group.step(refs))
    assert (result.applied, result.version, group.nonfinite_in_a_row) == (False, 0, 1)
    for write in (group.save, group.export):
        with pytest.raises(LearnerError, match="not finite"):
            asyncio.run(write(tmp_path))
    assert rank.calls == ["step"]
    rank.finite = True
    assert asyncio.run(group.step(refs)).version == 1
    asyncio.run(group.save(tmp_path))
    assert rank.calls[-1] == "save"
    rank.finite = False
    asyncio.run(group.step(refs))
    asyncio.run(group.step(refs))
    with pytest.raises(LearnerError, match="3 optimizer updates in a row"):
        asyncio.run(group.step(refs))


async def fail_after(seconds: float, error: Exception) -> Any:
    await asyncio.sleep(seconds)
    raise error


async def return_after(seconds: float, value: Any) -> Any:
    await asyncio.sleep(seconds)
    return value


def test_results_come_in_the_order_of_ranks() -> None:
    calls = [return_after(0.02, "a"), return_after(0.0, "b")]
    assert asyncio.run(results_of("a step", calls, 5)) == ["a", "b"]


def test_the_cause_is_told_from_its_consequences() -> None:
    """Rank 0 loses its connection because rank 1 ran into an error of its own."""
    calls = [
        fail_after(0.0, RuntimeError("[gloo] Connection closed by peer")),
        fail_after(0.05, ValueError("bad completion")),
    ]
    with pytest.raises(LearnerError, match=r"rank 1 failed a step: ValueError: bad completion"):
        asyncio.run(results_of("a step", calls, 5))


@pytest.mark.parametrize(
    ("error", "again"), [(ValueError("bad completion"), False), (RuntimeError("device"), True)]
)
def test_ranks_are_not_started_again_for_what_one_refuses(
    monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    """The other rank waits for it without end, as in a collective operation."""
    monkeypatch.setattr(ranks, "GRACE_S", 0.05)
    with pytest.raises(LearnerError, match="rank 0 failed a step") as raised:
        asyncio.run(results_of("a step", [fail_after(0.0, error), return_after(30, 2)], 60))
    assert (raised.value.lost, raised.value.savable) == (again, False)


def test_a_wait_ends_and_says_for_whom() -> None:
    calls = [return_after(0.0, 1), return_after(30, 2)]
    with pytest.raises(LearnerError, match=r"rank\(s\) \[1\] did not finish a step within 0.05 s"):
        asyncio.run(results_of("a step", calls, 0.05))


def test_float32_optimizer_clips_and_leaves_out_what_is_not_finite() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    learner = LearnerConfig(zero_stage=0, gradient_clip=0.5, learning_rate=0.1, adam_eps=100.0)
    optimizer = client_optimizer([weight], learner, "float32")
    weight.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(4.0)
    assert float(weight.grad.norm()) == pytest.approx(0.5, rel=1e-4)
    moved = weight.detach().clone()
    assert not torch.equal(moved, torch.ones(4))
    weight.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight.detach(), moved)
    assert float(optimizer.state[weight]["step"]) == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_deepspeed_never_averages(stage: Any, dtype: Any) -> None:
    config = deepspeed_config(LearnerConfig(zero_stage=stage), dtype)
    assert config["gradient_accumulation_steps"] == 1
    assert config["managed_gradient_accumulation"] is False
    assert ("bf16" in config) == (dtype == "bfloat16")
    assert ("fp16" in config) == (dtype == "float16")
    if dtype == "float16":
        # 0: dynamic.
        assert (config["fp16"]["loss_scale"], config["fp16"]["hysteresis"]) == (0, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_takes_the_configuration(stage: Any, device: str) -> None:
    """What DeepSpeed's engine asserts where steps have any number of micro-batches."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    config = deepspeed_config(LearnerConfig(zero_stage=stage), "bfloat16", device)
    assert config["zero_optimization"]["overlap_comm"] == (device == "cuda" and stage >= 2)
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    engine._config = DeepSpeedConfig(config)
    engine.client_optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    engine.client_lr_scheduler = None
    engine.pipeline_parallelism = False
    engine._do_sanity_check()


def test_memory_options_reach_deepspeed_and_change_nothing_else() -> None:
    plain = deepspeed_config(LearnerConfig(zero_stage=3), "bfloat16")
    del plain["zero_optimization"]["reduce_bucket_size"]
    given = {"zero_optimization": {"reduce_bucket_size": 1000}, "memory_breakdown": True}
    learner = LearnerConfig(zero_stage=3, offload="all", deepspeed=given)
    found = deepspeed_config(learner, "bfloat16")
    zero = found.pop("zero_optimization")
    assert zero.pop("reduce_bucket_size") == 1000
    assert zero.pop("offload_optimizer")["device"] == zero.pop("offload_param")["device"] == "cpu"
    assert found.pop("memory_breakdown") is True
    assert {**found, "zero_optimization": zero} == plain
    state = LearnerConfig(zero_stage=1, offload="optimizer")
    assert "offload_param" not in deepspeed_config(state, "bfloat16")["zero_optimization"]


def test_importing_the_learner_stays_light() -> None:
    code = (
        "import sys, cohort.learner.learner, cohort.learner.checkpoint, cohort.learner.weights;"
        "heavy = {'deepspeed', 'transformers', 'vllm'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


LATE = """
import time
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.spec import LearnerSpec
from cohort.learner import saving, setup
from cohort.learner.worker import LearnerWorker

def late_set_up(*_):
    time.sleep(0.6)
    return None, None

def late_export(*_):
    time.sleep(0.6)

setup.set_up, saving.export = late_set_up, late_export
worker = LearnerWorker(LearnerSpec(
    model_path="none", dtype="float32", learner=LearnerConfig(step_timeout_s=0.3),
    algorithm=AlgorithmConfig(), temperature=1.0, max_tokens=1, rank=0, world_size=1, device="cpu",
    threads=1, seed=0, shm_dir={shm!r}, log_dir={logs!r},
))
worker.setup("127.0.0.1", 0, timeout_s=0.3)
worker.export("nowhere")
"""


@pytest.mark.slow
def test_a_late_rank_says_where_it_is(tmp_path: Path) -> None:
    code = LATE.format(shm=str(tmp_path / "shm"), logs=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    log = (tmp_path / "learner-0.log").read_text()
    assert log.count("most recent call first") == 2
    assert log.index("in late_set_up") < log.index("in late_export")
