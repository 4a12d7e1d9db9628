"""The journal in whole runs: killed anywhere, continued with the very groups that were scored."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cohort.cluster.commands.replay
from cohort.actors.records import Failure
from cohort.cluster.journal.history import History, read_history
from cohort.cluster.journal.records import GroupRecord, StepRecord
from cohort.cluster.journal.segments import JournalError, numbers, read_segment, segment_file
from cohort.cluster.journal.writer import JournalWriter
from tests.harness.world import Chaos, World
from tests.pace import some

MakeWorld = Callable[..., World]
STEPS = 7
KEYS = {
    "run__steps": STEPS,
    "run__checkpoint_every": 3,
    "run__keep_checkpoints": 9,
    "run__keep_journal": True,
}


def journal(run: World) -> History:
    return read_history(run.folder / "journal")


def killed(straight: World, run: World, segment: int, size: int) -> None:
    """Make of a run's folder what a kill leaves, when the journal has so many bytes.

    A segment begins when a checkpoint is complete: when the nth is written, n - 1 of them are.
    """
    shutil.copytree(straight.folder, run.folder)
    for number in numbers(run.folder / "journal"):
        file = segment_file(run.folder / "journal", number)
        if number > segment:
            file.unlink()
        elif number == segment:
            with file.open("r+b") as opened:
                opened.truncate(size)
    checkpoints = sorted(
        (run.folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1])
    )
    for late in checkpoints[segment - 1 :]:
        shutil.rmtree(late)


def moments(folder: Path) -> list[tuple[int, int]]:
    """Every place behind a record, and one inside of each."""
    found = []
    for number in numbers(folder):
        segment = read_segment(folder, number)
        starts = [offset for _, offset in segment.entries]
        ends = [*starts[1:], segment.end]
        found += [(number, end) for end in ends]
        found += [(number, (start + end) // 2) for start, end in zip(starts, ends, strict=True)]
    return sorted(found)


def asked(run: World) -> set[str]:
    """The groups that engines were asked for."""
    calls = [event for event in run.events("call") if event.what == "submit"]
    return {request.group_id for call in calls for request in call.detail["args"][0]}


def contents(run: World, step: int) -> list[tuple[Any, ...]]:
    """What a step has trained."""
    fields = ("completion_id", "token_ids", "reward", "seed", "weight_versions", "errors")
    return [tuple(str(row[name]) for name in fields) for row in run.rollouts(step)]


def check_resumed(straight: World, run: World, moment: tuple[int, int]) -> None:
    """Kill a run there, let it go on, and compare it with the one that was not killed."""
    killed(straight, run, *moment)
    there = journal(run)
    saved = run.newest()
    assert run.train(run__resume=True) == 0
    # No step, no prompt and no completion is missing or doubled.
    assert [row["step"] for row in run.rows()] == list(range(STEPS))
    names = [name for step in range(STEPS) for name, *_ in contents(run, step)]
    assert names == [name for step in range(STEPS) for name, *_ in contents(straight, step)]
    assert len(set(names)) == len(names) == run.rows()[-1]["samples/trained"]
    # What was scored is not generated again, and is what is trained.
    journaled = {name for step, groups in there.groups.items() if step >= saved for name in groups}
    assert not asked(run) & journaled
    for step in range(STEPS):
        theirs = {row[0]: row for row in contents(straight, step)}
        for row in contents(run, step):
            if row[0].rpartition("/")[0] in journaled:
                assert row == theirs[row[0]]
    # The steps that were recorded lead to the same weights.
    before, after = journal(straight), journal(run)
    for step in there.steps:
        assert after.weights[step].fingerprint == before.weights[step].fingerprint
    assert sorted(after.steps) == sorted(after.weights) == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(6), 6, 6))
@pytest.mark.parametrize("staleness", some([2, 0, 1, 4], 4))
def test_a_run_killed_at_any_record_goes_on_with_the_groups_that_were_scored(
    world: MakeWorld, staleness: int, seed: int
) -> None:
    straight = world("straight", actors__max_staleness=staleness, **KEYS)
    assert straight.train() == 0
    everywhere = moments(straight.folder / "journal")
    for number, moment in enumerate(random.Random(seed).sample(everywhere, 8)):
        run = world(f"killed-{number}", actors__max_staleness=staleness, **KEYS)
        check_resumed(straight, run, moment)


@pytest.mark.parametrize("staleness", [1, 3])
def test_prompts_drawn_ahead_are_neither_seen_again_nor_left_out(
    world: MakeWorld, staleness: int
) -> None:
    """With dynamic sampling, refills of one step lie between the prompts of later ones."""
    keys = {
        "run__steps": 8,
        "run__checkpoint_every": 1,
        "run__keep_checkpoints": 9,
        "actors__max_staleness": staleness,
        "algorithm__dynamic_sampling_rounds": 3,
        "rewards__functions": "[tests.harness.rewards:often_equal]",
    }
    straight = world("straight", **keys)
    assert straight.train() == 0
    assert any(row["rollout/refill_rounds"] for row in straight.rows()[:5])
    prompts = [row["prompt_id"] for step in range(8) for row in straight.rollouts(step)]
    assert len(set(prompts)) == len(prompts) / 4
    for step in (2, 5):
        run = world(f"from-{step}", **keys)
        shutil.copytree(straight.folder, run.folder)
        shutil.rmtree(run.folder / "journal")
        for late in range(step + 1, 9):
            shutil.rmtree(run.folder / "checkpoints" / f"step-{late}")
        assert run.train(run__resume=True) == 0
        drawn = [row["prompt_id"] for n in range(8) for row in run.rollouts(n)]
        # Which prompts have signal depends on nothing else here.
        assert drawn == prompts


def test_a_journal_of_another_run_is_kept_aside(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world("run", actors__max_staleness=2, **KEYS)
    run.on("step", lambda _: run.stop(), nth=4)
    assert run.train() == 0
    run.forget_hooks()
    ahead = {name for step in (4, 5) for name in journal(run).groups[step]}
    assert len(ahead) == 8
    other = {"run__resume": True, "actors__temperature": 0.7}
    allowed = "[actors.temperature]"
    assert run.train(run__allow_changed=allowed, **other) == 0
    assert ahead <= asked(run)
    assert "journal/ is kept aside" in capsys.readouterr().out
    assert 4 in read_history(run.folder / "replaced-001" / "journal").groups
    assert min(journal(run).steps) == 4


def test_fewer_steps_of_staleness_do_not_train_what_is_too_old(world: MakeWorld) -> None:
    run = world("run", actors__max_staleness=3, **KEYS)
    run.on("step", lambda _: run.stop(), nth=4)
    assert run.train() == 0
    run.forget_hooks()
    assert run.train(run__resume=True, actors__max_staleness=1) == 0
    assert [row["async/staleness_max"] <= 1 for row in run.rows()[4:]] == [True] * 3


def test_a_process_of_the_journal_that_dies_is_replaced_and_loses_nothing(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = world("straight", actors__max_staleness=2, **KEYS)
    run = world("run", actors__max_staleness=2, **KEYS)
    assert straight.train() == 0
    for nth, what in ((3, "put_group"), (20, "put_group"), (4, "put_step"), (2, "put_weights")):
        run.on("call", lambda event: run.ray.kill(event.actor), what=what, nth=nth)
    run.on("done", lambda event: run.ray.kill(event.actor), what="put_group", nth=9)
    assert run.train() == 0
    assert run.run.journal.replaced == 5
    assert "the process that writes journal/ was replaced" in capsys.readouterr().out
    assert [contents(run, step) for step in range(STEPS)] == [
        contents(straight, step) for step in range(STEPS)
    ]
    ours, theirs = journal(run), journal(straight)
    assert sorted(ours.steps) == list(range(STEPS))
    for step in range(STEPS):
        assert [n for n, _ in ours.steps[step].groups] == [n for n, _ in theirs.steps[step].groups]


def test_a_process_of_the_journal_that_hangs_is_replaced(world: MakeWorld) -> None:
    run = world("run", **KEYS)
    run.on("call", lambda event: run.ray.freeze(event.actor), what="put_step", nth=2)
    assert run.train() == 0
    assert run.run.journal.replaced == 1
    assert run.time < 300


def test_without_room_a_step_is_not_trained_and_the_learner_is_saved(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world("run", **KEYS)
    real = JournalWriter.append
    full = True

    def append(self: JournalWriter, record: Any) -> Any:
        if full and isinstance(record, StepRecord) and record.step == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, record)

    monkeypatch.setattr(JournalWriter, "append", append)
    with pytest.raises(JournalError, match=r"step 5 is not trained.*No space left.*run.resume"):
        run.train()
    assert run.newest() == 5
    assert len(run.trained()) == 5 * 16
    full = False
    assert run.train(run__resume=True) == 0
    assert len(run.trained()) == 2 * 16
    # Its groups were there.
    assert not asked(run) & set(journal(run).groups[5])


def test_a_group_that_found_no_room_is_written_when_there_is_some(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world("run", **KEYS)
    real, failed = JournalWriter.append, 0

    def append(self: JournalWriter, record: Any) -> Any:
        nonlocal failed
        if isinstance(record, GroupRecord) and record.step == 2 and failed < 3:
            failed += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, record)

    monkeypatch.setattr(JournalWriter, "append", append)
    assert run.train() == 0
    assert failed == 3
    assert len(journal(run).groups[2]) == 4


@pytest.mark.slow
def test_the_journal_holds_what_checkpoints_that_are_kept_need_and_no_more(
    world: MakeWorld,
) -> None:
    keys = {"run__steps": 12, "run__checkpoint_every": 2, "run__keep_checkpoints": 2}
    run = world("run", actors__max_staleness=2, **keys)
    assert run.train() == 0
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-10", "step-12"]
    assert 10 in journal(run).steps
    assert min(journal(run).steps) >= 8
    small = world("small", run__journal_gb=1e-9, actors__max_staleness=2, **keys)
    small.on("step", lambda _: small.stop(), nth=9)
    assert small.train() == 0
    small.forget_hooks()
    # Nothing but what is ahead of the last checkpoint.
    left = journal(small)
    assert len(left.groups[9]) == 4
    assert small.train(run__resume=True) == 0
    assert not asked(small) & {name for step in (9, 10) for name in left.groups[step]}
    everything = world("everything", run__keep_journal=True, **keys)
    assert everything.train() == 0
    assert sorted(journal(everything).steps) == list(range(12))


def test_a_replay_leads_to_the_same_weights_without_an_engine(world: MakeWorld) -> None:
    run = world("run", actors__max_staleness=2, learner__workers=2, **KEYS)
    run.on("step", lambda _: run.stop(), actor="learner-0", nth=4)
    assert run.train() == 0
    run.forget_hooks()
    assert run.train(run__resume=True) == 0
    code, lines = run.replay()
    assert code == 0
    assert lines[-1] == "7 steps: 7 equal, 0 different, 0 not recorded"
    assert not run.events("call", actor="rollout") and not run.events("call", actor="reward")
    code, lines = run.replay("5:6")
    assert code == 0
    assert len(run.events("step", actor="learner-0")) == 2  # from the checkpoint of step 4
    assert lines[-1].startswith("1 steps: 1 equal")


def test_a_replay_notices_other_weights_and_names_their_step(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world("run", **KEYS)
    assert run.train() == 0
    real = cohort.cluster.commands.replay.read_group

    def changed(folder: Path, place: Any) -> GroupRecord:
        found: GroupRecord = real(folder, place)
        if found.step == 3:
            tokens = found.scored.group.completions[0].token_ids
            tokens[0] = (tokens[0] + 1) % 99
        return found

    monkeypatch.setattr(cohort.cluster.commands.replay, "read_group", changed)
    code, lines = run.replay("0:6")
    assert code == 1
    assert [line.split()[-1] for line in lines[1:-1]] == ["equal"] * 3 + ["DIFFERENT"] * 3


def test_a_step_is_on_the_disk_before_it_is_trained(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the learner begins, the step's record is there, and written through."""
    synced: dict[str, int] = {}
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        synced[os.readlink(f"/proc/self/fd/{file}")] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    run = world("run", actors__max_staleness=1, **KEYS)
    seen = []

    def look(event: Any) -> None:
        there = journal(run)
        step = max(there.steps)
        names = {name.rpartition("/")[0] for name in event.detail["completions"]}
        seen.append((step, names == {name for name, _ in there.steps[step].groups}))
        file = max((run.folder / "journal").iterdir())
        segment = read_segment(run.folder / "journal", max(numbers(run.folder / "journal")))
        record = [offset for label, offset in segment.entries if label.kind == "StepRecord"][-1]
        assert synced[str(file)] > record

    run.on("step", look, actor="learner-0")
    assert run.train() == 0
    assert seen == [(step, True) for step in range(STEPS)]


def test_groups_that_failed_in_a_recorded_step_fail_in_it_again(world: MakeWorld) -> None:
    keys = {"actors__max_staleness": 1, "rewards__max_error_rate": 0.5, **KEYS}
    straight, run = world("straight", **keys), world("run", **keys)
    lost = Failure("data", "a group cannot be generated", "out of range")

    def fail(event: Any) -> None:
        if event.detail["args"][0].startswith("2:") and not failed:
            failed.append(event.detail["args"][0])
            event.reply = (lost, None)

    failed: list[str] = []
    straight.on("call", fail, what="collect")
    assert straight.train() == 0
    assert straight.rows()[2]["rollout/groups_lost"] == 1
    check_resumed(straight, run, (1, segment_file(straight.folder / "journal", 1).stat().st_size))
    assert run.rows()[2]["rollout/groups_lost"] == 1
    assert run.rows()[-1]["samples/failed"] == 4
    assert not asked(run) & set(failed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(40), 20, 5))
def test_histories_of_kills_lose_nothing_and_repeat_nothing(world: MakeWorld, seed: int) -> None:
    """A driver that is killed again and again, at any event, with engines and workers that die
    besides. What was recorded once stays, and all of it can be replayed."""
    dice = random.Random(seed)
    keys = {
        **KEYS,
        "run__checkpoint_every": dice.choice([0, 1, 2, 3]),
        "run__keep_checkpoints": dice.choice([1, 9]),
        "actors__max_staleness": dice.choice([0, 1, 2, 3]),
        "learner__workers": dice.choice([1, 2]),
        "algorithm__dynamic_sampling_rounds": dice.choice([0, 2]),
        "rewards__functions": "[tests.harness.rewards:often_equal]",
    }
    run = world("run", **keys)
    before = History()
    for life in range(20):
        countdown = dice.randrange(1, 900)

        def kill(_: Any) -> None:
            nonlocal countdown
            countdown -= 1
            if not countdown:
                os.kill(os.getpid(), signal.SIGKILL)

        for kind in ("call", "done", "stored", "save", "written", "publish"):
            run.on(kind, kill)
        if life >= 5:
            run.forget_hooks()
        # An actor that dies while it starts ends the start, which is another matter.
        Chaos(run, dice.randrange(99), after="publish", kill=0.003, lose=0.003)
        code = run.train_in_child(run__resume=life > 0)
        run.forget_hooks()
        now = journal(run)
        for step, record in before.steps.items():
            assert now.steps[step].groups == record.groups, f"seed {seed}, life {life}"
        for step, weights in before.weights.items():
            assert now.weights[step] == weights
        before = now
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert sorted(before.steps) == list(range(STEPS)) == [row["step"] for row in run.rows()]
    names = [name for step in range(STEPS) for name, *_ in contents(run, step)]
    assert len(set(names)) == len(names)
    last = run.rows()[-1]
    accounted = last["samples/trained"] + last["samples/filtered"] + last["samples/failed"]
    assert accounted == last["samples/admitted"] == len(names)
    for row in run.rows():
        assert row["async/staleness_max"] <= keys["actors__max_staleness"]
    code, lines = run.replay()
    assert code == 0, lines


def test_a_step_that_leads_to_other_weights_than_before_is_said(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, run = world("straight", **KEYS), world("run", **KEYS)
    assert straight.train() == 0
    killed(straight, run, 1, segment_file(straight.folder / "journal", 1).stat().st_size)
    run.on("step", lambda event: setattr(event, "reply", "nonfinite"), nth=2)
    assert run.train(run__resume=True) == 0
    said = capsys.readouterr().out
    assert "step 1 was trained again from the journal and led to other weights" in said
    assert "step 0 was trained again" not in said


def test_a_checkpoint_counts_though_the_journal_cannot_be_trimmed(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world("run", **KEYS)
    run.on("call", lambda event: run.ray.kill(event.actor), what="trim")
    assert run.train() == 0
    assert run.newest() == STEPS
    said = capsys.readouterr().out
    assert said.count("old parts of journal/ could not be removed") == 3
    assert "could not be written" not in said
