"""A run may end at any moment, in any way: the same command goes on, and nothing is lost."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cohort.cluster.commands.train
import cohort.cluster.launch
import cohort.learner.checkpoint
from cohort.actors.pool import RolloutPool
from cohort.cluster.journal.journal import Journal
from cohort.cluster.launch import Services
from cohort.cluster.observe.metrics_file import MetricsFile
from cohort.cluster.observe.rollouts import RolloutWriter
from cohort.cluster.run_dir import RunDir
from cohort.learner.checkpoint import Checkpoints, is_complete
from cohort.learner.gang import Gang
from cohort.learner.learner import Learner
from cohort.rewards.pool import RewardPool
from tests.harness.world import World
from tests.open_files import open_files

MakeWorld = Callable[..., World]

# Where a run is ended: (what holds the function, its name, which call of it).
BEFORE_TRAINING = {
    "preparation": (cohort.cluster.commands.train, "prepare", 1),
    "the claim of the folder": (RunDir, "claim", 1),
    "the look for a checkpoint": (cohort.cluster.commands.train, "where_to_go_on", 1),
    "the look for space": (Checkpoints, "require_space", 1),
    "the start of Ray": (cohort.cluster.launch, "connect", 1),
    "placement": (cohort.cluster.launch, "make_pool", 1),
    "the start of the learner": (cohort.cluster.launch, "start_learner", 1),
    "the start of the engines": (RolloutPool, "start", 1),
    "the start of the rewards": (RewardPool, "check", 1),
    "the writing of the config": (cohort.cluster.commands.train, "write_config", 1),
    "the opening of the metrics": (cohort.cluster.commands.train, "Tracker", 1),
}
DURING_TRAINING = {
    "the first weights": (Learner, "publish", 1),
    "the first load": (RolloutPool, "sync", 1),
    "generation": (RolloutPool, "generate", 2),
    "a step": (Learner, "step", 3),
    "the journal of a step": (Journal, "before", 3),
    "the weights after a step": (Learner, "publish", 3),
    "the load after a step": (RolloutPool, "sync", 3),
    "the writing of completions": (RolloutWriter, "write", 2),
    "the writing of a fingerprint": (Journal, "after", 2),
    "the writing of metrics": (MetricsFile, "write", 2),
    "a save": (Learner, "save_behind", 1),
    "the writing of a copy": (Gang, "write", 1),
    "the ranks' own save": (Learner, "save", 1),
    "the second save": (Checkpoints, "begin", 2),
    "the end of a save": (Checkpoints, "commit", 1),
    "the marker of a save": (cohort.learner.checkpoint, "_write", 4),
    "the removal of old groups": (Journal, "trim", 1),
    "the last save": (Checkpoints, "commit", 2),
    "the goodbye": (cohort.cluster.commands.train, "say_goodbye", 1),
    "the end of the actors": (Services, "kill", 1),
}


class Broken(Exception):
    """What a test raises where nobody expects it."""


def fail() -> None:
    raise Broken("in the middle")


ENDS: dict[str, Callable[[], Any]] = {
    "error": fail,
    "exit": lambda: os._exit(9),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
}


def every_end(stages: Iterable[str]) -> list[Any]:
    """Every stage with every end: one of them in turns always, at every fourth stage fast."""
    return [
        pytest.param(stage, how, marks=_marks(n, how))
        for n, stage in enumerate(stages)
        for how in ENDS
    ]


def _marks(number: int, how: str) -> list[Any]:
    always = ("error", "SIGKILL", "SIGTERM")[number % 3]
    if how != always:
        return [pytest.mark.exhaustive]
    return [] if number % 4 == 0 else [pytest.mark.slow]


def end_at(patch: pytest.MonkeyPatch, place: tuple[Any, str, int], end: Callable[[], Any]) -> None:
    """Have the nth call of a function end the run first."""
    holder, name, nth = place
    real = getattr(holder, name)
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls == nth

    if inspect.iscoroutinefunction(real):

        async def ending(*args: Any, **kwargs: Any) -> Any:
            if now():
                end()
            return await real(*args, **kwargs)

        patch.setattr(holder, name, ending)
        return

    def ending_at_once(*args: Any, **kwargs: Any) -> Any:
        if now():
            end()
        return real(*args, **kwargs)

    patch.setattr(holder, name, ending_at_once)


def records(folder: Path) -> dict[str, list[str]]:
    """Every metrics row and every file of completions under a run directory, by where it is."""
    found: dict[str, list[str]] = {"rows": [], "rollouts": []}
    for file in folder.rglob("metrics.jsonl*"):
        found["rows"] += file.read_text().splitlines()
    for file in folder.rglob("step-*.jsonl*"):
        found["rollouts"].append(file.read_text())
    return found


def missing(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    return {kind: [r for r in rows if r not in after[kind]] for kind, rows in before.items()}


KEYS = {"run__steps": 4, "run__checkpoint_every": 2, "actors__count": 1, "rewards__workers": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """A run that nothing ended."""
    run = World(tmp_path_factory.mktemp("straight") / "run", tiny_model, **KEYS)
    assert run.train() == 0
    return run


def as_if_nothing_had_happened(run: World, straight: World) -> None:
    for ours, theirs in zip(run.weights().values(), straight.weights().values(), strict=True):
        assert np.array_equal(ours, theirs)
    assert [row["step"] for row in run.rows()] == [0, 1, 2, 3]
    for mine, theirs in zip(run.rows(), straight.rows(), strict=True):
        for key in ("reward/mean", "learner/loss", "samples/trained", "samples/admitted"):
            assert mine[key] == theirs[key]
    assert all(is_complete(f) for f in (run.folder / "checkpoints").iterdir())
    assert run.checkpoint().name == "step-4"
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize(("stage", "how"), every_end(BEFORE_TRAINING))
def test_a_start_that_ended_is_started_again_by_the_same_command(
    world: MakeWorld, straight: World, monkeypatch: pytest.MonkeyPatch, stage: str, how: str
) -> None:
    run = world(**KEYS)
    with monkeypatch.context() as patch:
        end_at(patch, BEFORE_TRAINING[stage], ENDS[how])
        code = run.train_in_child()
    expected = {"error": 70, "exit": 9, "SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
    assert code == expected[how]
    assert not list(run.folder.glob("replaced-*"))
    assert run.train_in_child() == 0
    as_if_nothing_had_happened(run, straight)
    # And a run that is there is not overwritten.
    assert run.train_in_child() == 70


@pytest.mark.parametrize(("stage", "how"), every_end(DURING_TRAINING))
def test_a_run_that_ended_in_any_stage_is_continued_and_keeps_what_it_recorded(
    world: MakeWorld, straight: World, monkeypatch: pytest.MonkeyPatch, stage: str, how: str
) -> None:
    run = world(**KEYS)
    with monkeypatch.context() as patch:
        end_at(patch, DURING_TRAINING[stage], ENDS[how])
        code = run.train_in_child()
    if how in ("exit", "SIGKILL"):
        assert code == (9 if how == "exit" else -9)
    before = records(run.folder)
    if how in ("error", "SIGTERM", "SIGINT") and (done := len(run.rows())):
        # The learner lived: what it had done is saved.
        assert run.state()["step"] == done
    again = run.train_in_child(run__resume=True)
    assert again == 0
    assert missing(before, records(run.folder)) == {"rows": [], "rollouts": []}
    as_if_nothing_had_happened(run, straight)


def test_a_run_leaves_nothing_open_in_its_process(world: MakeWorld) -> None:
    """Its journal's file, its lock, its event loop: one process may train many runs."""
    assert world("first", run__steps=2).train() == 0
    before = open_files()
    assert world("second", run__steps=2).train() == 0
    assert not open_files() - before
