"""What was learned is saved before an error ends a run, and reporting never is that error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cohort.cluster.observe.rollouts
from cohort.actors.pool import RolloutPool
from cohort.actors.records import Failure
from cohort.actors.slot import RolloutError
from cohort.cluster.failures import ProgramError, TrainingError, check_failures
from cohort.cluster.observe.metrics_file import MetricsFile
from cohort.cluster.stream import Batch
from cohort.learner.checkpoint import CheckpointError, Checkpoints, NotFiniteError
from cohort.learner.learner import Learner, LearnerError
from tests.harness.world import World
from tests.pace import some

MakeWorld = Callable[..., World]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails(patch: pytest.MonkeyPatch, holder: Any, name: str, when: Callable[[int], bool]) -> None:
    """Have calls of a function find a full disk, by their number from 1 on."""
    real = getattr(holder, name)
    calls = 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return full() if when(calls) else real(*args, **kwargs)

    patch.setattr(holder, name, sometimes)


# Whatever ends a run, what was learned is saved.


def break_sync(patch: pytest.MonkeyPatch) -> None:
    real = RolloutPool.sync

    async def sync(self: RolloutPool, info: Any, probe: Any) -> float:
        if info.version == 3:
            raise RolloutError("rollout-0 failed 4 times in a row")
        return await real(self, info, probe)

    patch.setattr(RolloutPool, "sync", sync)


def break_take(patch: pytest.MonkeyPatch) -> None:
    from cohort.cluster.stream import GroupStream

    real = GroupStream.take

    async def take(self: GroupStream, step: int) -> Any:
        batch = await real(self, step)
        if step == 3:
            raise AssertionError("samples do not add up")
        return batch

    patch.setattr(GroupStream, "take", take)


def break_publish(patch: pytest.MonkeyPatch) -> None:
    real = Learner.publish

    async def publish(self: Learner, remote: bool = False) -> Any:
        if self.version == 3:
            raise LearnerError("learner rank 0 failed publishing the weights: no space")
        return await real(self, remote)

    patch.setattr(Learner, "publish", publish)


@pytest.mark.parametrize("staleness", some([2, 0], 2))
@pytest.mark.parametrize(
    ("breaks", "error"),
    [(break_sync, RolloutError), (break_take, AssertionError), (break_publish, LearnerError)],
)
def test_a_learner_that_lives_is_saved_before_an_error_ends_the_run(
    world: MakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    breaks: Callable[[pytest.MonkeyPatch], None],
    error: type[Exception],
    staleness: int,
) -> None:
    keys = {"run__steps": 6, "actors__max_staleness": staleness}
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train() == 0
    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises(error):
            run.train()
    assert run.state()["step"] == 3
    # The step after which it failed counts and is recorded, though its times are not known.
    assert [row["step"] for row in run.rows()] == [0, 1, 2]
    assert len(run.rollouts(2)) == 16
    assert run.state()["cursor"] == 12
    assert "run.resume=true goes on after step 3" in capsys.readouterr().out
    assert run.train(run__resume=True) == 0
    for step in range(6):
        ours, theirs = run.rollouts(step), straight.rollouts(step)
        assert [r["completion_id"] for r in ours] == [r["completion_id"] for r in theirs]
    assert run.rows()[-1]["samples/admitted"] == 6 * 16


def test_pass_rates_of_a_step_that_was_not_trained_are_not_saved(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "{curriculum: true, tasks: [{name: addition, label: a}, {name: addition, label: b}]}"
    keys = {"run__steps": 5, "task__name": "mixture", "task__options": options}
    straight, run = world("straight", **keys), world("broken", **keys)
    assert straight.train(run__keep_checkpoints=9, run__checkpoint_every=1) == 0
    with monkeypatch.context() as patch:
        break_take(patch)
        with pytest.raises(AssertionError):
            run.train()
    from cohort.learner.checkpoint import load_state

    there = load_state(straight.folder / "checkpoints" / "step-3")
    assert run.state()["pass_rates"] == there["pass_rates"]


def test_a_learner_that_is_lost_is_not_waited_for(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = dict(run__checkpoint_every=2, learner__workers=2, learner__keep_copy=False)
    run = world(run__steps=6, **keys)
    run.on("step", lambda _: run.ray.kill("learner-1"), actor="learner-0", nth=4)
    with pytest.raises(LearnerError, match=r"no copy of the 3 steps"):
        run.train()
    assert run.state()["step"] == 2
    assert "the learner is lost: the newest complete checkpoint is" in capsys.readouterr().out


def test_with_no_actor_left_the_run_waits_then_saves_and_names_the_key(world: MakeWorld) -> None:
    run = world(run__steps=6, actors__count=2, actors__start_timeout_s=120)
    # From the fourth step on every engine dies, and none can start.
    reply = Failure("infra", "could not start its engine", "no memory")

    def begin(_: Any) -> None:
        run.on("call", lambda event: setattr(event, "reply", reply), actor="actor", what="start")
        run.on("call", lambda event: setattr(event, "reply", reply), actor="rollout", what="start")
        run.ray.hooks[:] = run._hooks
        run.ray.kill("rollout-0")
        run.ray.kill("rollout-1")

    run.on("step", begin, nth=3)
    with pytest.raises(
        RolloutError, match=r"no rollout actor is left.*actors\.start_timeout_s=120"
    ):
        run.train()
    assert run.state()["step"] == 3
    assert len(run.rows()) == 3
    assert 120 < run.time < 240


def test_too_many_skipped_updates_end_the_run_saved(world: MakeWorld) -> None:
    run = world(run__steps=9)
    run.on("step", lambda event: setattr(event, "reply", "nonfinite") if run_step(event) else None)
    with pytest.raises(LearnerError, match="3 optimizer updates in a row"):
        run.train()
    state = run.state()
    # Two skipped steps count as done, the third ended the run.
    assert state["step"] == 5
    assert state["counters"]["skipped_steps"] == 2


def run_step(event: Any) -> bool:
    return bool(event.detail["number"] == 3)


def test_a_last_step_that_is_not_finite_loses_nothing(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run, three = world("four", run__steps=4), world("three", run__steps=3)
    run.on("step", lambda event: setattr(event, "reply", "nonfinite"), nth=4)
    assert run.train() == 0
    assert three.train() == 0
    assert run.state()["step"] == 4
    for ours, theirs in zip(run.weights().values(), three.weights().values(), strict=True):
        assert np.array_equal(ours, theirs)
    assert "saving checkpoint 4 (the last update was not finite" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_saved(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.harness.learner import LocalLearnerWorker

    run = world(run__steps=6, run__checkpoint_every=2)
    with monkeypatch.context() as patch:
        saved = 0
        real = LocalLearnerWorker.prepare_save

        async def prepare_save(self: Any) -> None:
            nonlocal saved
            saved += 1
            if saved == 2:
                raise NotFiniteError("the weights hold a NaN")
            await real(self)

        patch.setattr(LocalLearnerWorker, "prepare_save", prepare_save)
        with pytest.raises(LearnerError, match="the weights hold a NaN"):
            run.train()
    # At once: no retries, no further steps.
    assert saved == 2
    assert len(run.events("step")) == 4
    assert len(run.events("save")) == 1
    assert run.checkpoint().name == "step-2"
    assert [p.name for p in run.checkpoint().parent.iterdir()] == ["step-2"]


# A save that fails.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["begin", "commit"])
def test_a_full_disk_during_training_is_tried_again_after_later_steps(
    world: MakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    run = world(run__steps=40, run__checkpoint_every=10)
    fails(monkeypatch, Checkpoints, name, lambda call: call == 2)
    seen: list[str] = []
    for kind in ("save", "write"):
        run.on(kind, lambda event: seen.append(Path(event.what).name))
    assert run.train() == 0
    said = capsys.readouterr().out
    assert "checkpoint 20 could not be written, training goes on" in said
    # The one before it stays until there is a newer one; a minute later it is tried again.
    expected = ["tmp-10", "tmp-30", "tmp-40"] if name == "begin" else None
    assert expected is None or [s for s in seen if s in expected] == expected
    assert run.state()["step"] == 40
    assert not list((run.folder / "checkpoints").glob("tmp-*"))


def test_a_full_disk_at_the_end_is_waited_for(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=3)
    fails(monkeypatch, Checkpoints, "commit", lambda call: call < 5)
    assert run.train() == 0
    assert run.state()["step"] == 3
    assert capsys.readouterr().out.count("trying again in") == 4


def test_a_disk_that_stays_full_ends_in_an_error_and_keeps_the_old_checkpoint(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world(run__steps=5, run__checkpoint_every=2, run__keep_checkpoints=1)
    fails(monkeypatch, Checkpoints, "commit", lambda call: call > 1)
    with pytest.raises(CheckpointError, match=r"step 5 could not be saved in 6.. s.*No space left"):
        run.train()
    assert run.checkpoint().name == "step-2"
    assert run.time > 600


def test_space_is_needed_for_one_more_than_is_kept(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    checkpoints = Checkpoints(tmp_path / "c", keep=2, expected_bytes=int(free * 0.4))
    checkpoints.require_space(2)
    with pytest.raises(CheckpointError, match=r"3 of them .* are free"):
        checkpoints.require_space(3)


# Reporting.


def test_a_rollout_writer_that_dies_is_replaced(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=4)
    run.on("call", lambda event: run.ray.kill(event.actor), what="write", nth=2)
    assert run.train() == 0
    assert [len(run.rollouts(step)) for step in range(4)] == [16] * 4
    assert run.run.recorder.writer.replaced == 1
    assert (
        "step 1: the rollout writer, which writes rollouts/, was replaced"
        in capsys.readouterr().out
    )
    assert [row.get("report/rollout_writer_replaced") for row in run.rows()] == [None, 1, 1, 1]


def test_a_rollout_writer_that_hangs_is_replaced(world: MakeWorld) -> None:
    run = world(run__steps=3)
    run.on("call", lambda event: run.ray.freeze(event.actor), what="write", nth=2)
    assert run.train() == 0
    assert [len(run.rollouts(step)) for step in range(3)] == [16] * 3
    assert run.run.recorder.writer.replaced == 1
    assert run.time < 300


def test_completions_that_cannot_be_written_end_nothing(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=4)
    fails(
        monkeypatch,
        cohort.cluster.observe.rollouts,
        "rollout_file",
        lambda call: call in (2, 3),
    )
    assert run.train() == 0
    assert [row.get("report/rollouts_missed") for row in run.rows()] == [None, 1, 2, 2]
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1
    assert "not recorded: rollouts of 2 steps" in said


def test_metrics_that_cannot_be_written_are_written_later(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world(run__steps=4)

    fails(monkeypatch, MetricsFile, "write", lambda call: call in (2, 3))
    assert run.train() == 0
    assert [row["step"] for row in run.rows()] == [0, 1, 2, 3]
    assert run.rows()[3]["report/metrics_missed"] == 2


@pytest.mark.parametrize("broken", ["memory", "console"])
def test_the_goodbye_and_the_console_end_nothing(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    from cohort.cluster.observe.console import Console

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    run = world(run__steps=3)
    if broken == "memory":
        run.on("call", lambda event: run.ray.kill(event.actor), what="memory")
    else:
        monkeypatch.setattr(Console, "step", closed)
    assert run.train() == 0
    assert run.state()["step"] == 3


# Who failed.


def lost(name: str, kind: Any) -> Failure:
    return Failure(kind, f"group {name} cannot be generated", "out of range")


def answer_with(run: World, kind: Any, count: int) -> None:
    """Have that many groups of every step fail."""
    seen: dict[int, int] = {}

    def hook(event: Any) -> None:
        name = event.detail["args"][0]
        step = int(name.split(":")[0])
        if seen.setdefault(step, 0) < count:
            seen[step] += 1
            event.reply = (lost(name, kind), None)

    run.on("call", hook, what="collect")


def test_lost_groups_count_with_all_their_completions(world: MakeWorld) -> None:
    run = world(run__steps=3, task__prompts_per_step=8)
    answer_with(run, "data", 3)
    with pytest.raises(TrainingError, match=r"step 0: 37\.5% .* The first: group .* out of range"):
        run.train()


def test_groups_lost_below_the_limit_are_said_once_and_counted(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=3, task__prompts_per_step=8, rewards__max_error_rate=0.5)
    answer_with(run, "data", 3)
    assert run.train() == 0
    assert [row["rollout/groups_lost"] for row in run.rows()] == [3, 3, 3]
    assert [row["reward/error_rate"] for row in run.rows()] == [0.375] * 3
    assert [row["samples/failed"] for row in run.rows()] == [12, 24, 36]
    assert capsys.readouterr().out.count("out of range") == 1


def test_a_mistake_in_a_program_ends_the_run_with_its_traceback(world: MakeWorld) -> None:
    config = world(rewards__max_error_rate=1).config()
    mistake = Failure("bug", "a group could not be scored", "Traceback ...\nNameError: x")
    with pytest.raises(ProgramError, match=r"could not be scored: Traceback (.|\n)*NameError: x"):
        check_failures(config, Batch(3, 4, [], (("3:0-0", mistake),), 0.0, 0.0, 1.0))
