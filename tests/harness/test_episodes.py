"""Episodes of several turns under deaths, freezes and losses: every one is whole, or counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from tests.harness.environments import LocalEnvironmentWorker
from tests.harness.local_ray import Event
from tests.harness.test_chaos import check_books
from tests.harness.world import Chaos, World
from tests.pace import some

KEYS: dict[str, Any] = {
    "task__environment": "tests.harness.environments:Talk",
    "environments__workers": 2,
    "environments__max_turns": 4,
    "model__max_length": 300,
    "actors__max_tokens": 12,
    # Of 16 episodes one may fail, or two.
    "rewards__max_error_rate": 0.2,
}
MAX_TURNS = 4


class Talks(World):
    """A world of episodes. left: what was still held of any when the last of them had been trained;
    behind the end everything is gone anyway."""

    def __init__(self, folder: Path, model: Path, **overrides: Any) -> None:
        super().__init__(folder, model, **{**KEYS, **overrides})
        self.left: list[str] = []
        self.on("save", self._look)

    def _look(self, _: Event) -> None:
        for process in self.ray.processes:
            self.left += process.left
        for actor in self.ray.actors:
            if isinstance(actor.instance, LocalEnvironmentWorker):
                self.left += actor.instance._episodes


MakeTalks = Callable[..., Talks]


@pytest.fixture
def talks(tmp_path: Path, tiny_model: Path) -> MakeTalks:
    return lambda name="run", **keys: Talks(tmp_path / name, tiny_model, **keys)


def plays(run: World) -> dict[str, list[list[list[int]]]]:
    """Of each completion's id, the replies that the environment got in each of its plays.

    The last one that began need not be the one that counts: an actor that has died may have asked
    for it before.
    """
    heard: dict[str, list[list[int]]] = {}
    names: dict[str, list[str]] = {}
    for event in run.events("answer"):
        key = event.detail["episode"]
        if event.what == "reset":
            heard[key] = []
            names.setdefault(key.rpartition("/")[0], []).append(key)
        elif event.what == "step":
            heard[key].append(event.detail["arguments"]["reply"]["token_ids"])
    return {name: [heard[key] for key in keys] for name, keys in names.items()}


def check_episodes(run: Talks, steps: int) -> None:
    """What must hold of the episodes of every run that ended well, whatever happened in it."""
    check_books(run, steps)
    staleness = run.config().actors.max_staleness
    heard, trained = plays(run), set(run.trained())
    failed = 0
    for row in run.rows():
        step = row["step"]
        episodes = run.rollouts(step)
        whole = [sample for sample in episodes if sample["episode"]["failure"] is None]
        failed += len(episodes) - len(whole)
        for sample in whole:
            turns = sample["episode"]["turns"]
            assert 1 <= len(turns) <= MAX_TURNS
            # What was sampled is what the environment heard, turn by turn, and what is trained.
            lengths, tokens = [turn["tokens"] for turn in turns], sample["token_ids"]
            replies = next(
                play
                for play in heard[sample["completion_id"]]
                if [len(reply) for reply in play] == lengths
                and [token for reply in play for token in reply] == tokens
            )
            assert [turn["reward"] for turn in turns] == [float(sum(r) % 5) for r in replies]
            assert sample["by_function"]["environment"] == sum(turn["reward"] for turn in turns)
            for turn in turns:
                first, last = turn["weight_versions"]
                assert step - staleness <= first <= last <= step
        for sample in episodes:
            if sample["episode"]["failure"] is not None:
                assert sample["completion_id"] not in trained
                assert not sample["token_ids"] and not sample["episode"]["turns"]
                assert sample["by_function"]["environment"] is sample["reward"] is None
        # Those of an episode that failed were sampled too; they are counted and not kept.
        lost = row["episodes/turns_total"] - sum(len(s["episode"]["turns"]) for s in whole)
        assert 0 <= lost <= MAX_TURNS * (len(episodes) - len(whole))
        kinds = {k: v for k, v in row.items() if k.startswith("episodes/failed/")}
        assert sum(kinds.values()) == len(episodes) - len(whole)
    assert run.rows()[-1]["samples/failed"] >= failed
    # The engines' own log-probs of every turn are the learner's, with exactly that context.
    if staleness == 0:
        assert max(row["mismatch/logprob_abs_max"] for row in run.rows()) < 1e-4
    # Nothing is played on when nobody waits for it, and every environment was closed.
    assert run.events("save")
    assert run.left == []


def test_every_turn_is_accounted_for(talks: MakeTalks) -> None:
    run = talks(run__steps=6)
    assert run.train() == 0
    check_episodes(run, 6)
    rows = run.rows()
    assert sum(row["episodes/turns_total"] for row in rows) > 6 * 16
    assert rows[-1]["samples/failed"] == 0
    for event in run.events("done", actor="rollout"):
        if event.what == "collect":
            assert 0 < event.detail["answer"][0].seconds < 60
    calls = Counter(event.what for event in run.events("answer"))
    assert calls["reset"] == calls["close"] == 6 * 16
    assert calls["step"] == sum(row["episodes/turns_total"] for row in rows)


@pytest.mark.parametrize("staleness", [1, 2])
def test_weights_may_change_between_turns_within_bounds(talks: MakeTalks, staleness: int) -> None:
    run = talks(run__steps=8, actors__max_staleness=staleness)
    # One engine is slow: it is in the middle of episodes when weights come.
    run.slow["rollout-1"] = 8.0
    assert run.train() == 0
    check_episodes(run, 8)
    spans = [
        [turn["weight_versions"] for turn in sample["episode"]["turns"]]
        for step in range(8)
        for sample in run.rollouts(step)
    ]
    assert any(turns[0][1] < turns[-1][0] for turns in spans if turns)
    # And in the middle of one.
    assert any(first < last for turns in spans for first, last in turns)


HITS = {
    "worker": lambda run, event: run.ray.kill(event.actor),
    "worker for memory": lambda run, event: run.ray.kill(
        event.actor, OutOfMemoryError("killed by Ray's memory monitor")
    ),
    "frozen worker": lambda run, event: run.ray.freeze(event.actor),
    "process": lambda run, event: event.detail["process"].kill(),  # noqa: ARG005
    "engine": lambda run, _: run.ray.kill("rollout-0"),
    "frozen engine": lambda run, _: run.ray.freeze("rollout-0"),
}


@pytest.mark.parametrize("what", some(["step", "reset", "close"], 3))
@pytest.mark.parametrize("hit", HITS)
def test_what_dies_in_an_episode_costs_none(talks: MakeTalks, hit: str, what: str) -> None:
    """What was lost is begun again, with the same seeds."""
    run = talks(run__steps=3)
    run.on("answer", lambda event: HITS[hit](run, event), what=what, nth=9)
    assert run.train() == 0
    check_episodes(run, 3)
    assert run.rows()[-1]["samples/failed"] == 0


def test_what_an_engine_left_behind_does_not_end_what_was_begun_again(talks: MakeTalks) -> None:
    """The environment is still at its answer to the engine that died, and then done."""
    run = talks(
        run__steps=2,
        task__environment_options='{"seconds": 60}',
        environments__step_timeout_s=600,
        environments__episode_timeout_s=6000,
    )
    run.on("answer", lambda _: run.ray.kill("rollout-0"), what="step", nth=9)
    assert run.train() == 0
    check_episodes(run, 2)
    assert run.rows()[-1]["samples/failed"] == 0
    names = [event.detail["episode"].partition("#")[0] for event in run.events("answer")]
    assert not [name for name in names if name.endswith("/1")], "lost a second time"


def test_an_episode_that_was_begun_again_is_the_same(talks: MakeTalks) -> None:
    quiet = talks(name="quiet", run__steps=2)
    assert quiet.train() == 0
    run = talks(name="lost", run__steps=2)
    run.on("answer", lambda event: run.ray.kill(event.actor), what="step", nth=9)
    assert run.train() == 0

    def tokens(world: World) -> dict[str, list[int]]:
        return {row["completion_id"]: row["token_ids"] for row in world.rollouts(0)}

    assert tokens(run) == tokens(quiet)


def test_an_episode_that_dies_twice_is_counted(talks: MakeTalks) -> None:
    """Its process dies whenever it is in the first turn; the others are none of its business."""
    run = talks(run__steps=2)

    def hit(event: Any) -> None:
        if event.detail["episode"].partition("#")[0] in (f"{victim}/0", f"{victim}/1"):
            event.detail["process"].kill()

    dry = talks(name="dry", run__steps=1)
    assert dry.train() == 0
    victim = dry.rollouts(0)[0]["completion_id"]
    run.on("answer", hit, what="step")
    assert run.train() == 0
    check_episodes(run, 2)
    failures = [row["episode"]["failure"] for row in run.rollouts(0)]
    (failure,) = [one for one in failures if one is not None]
    assert "SIGKILL" in failure
    assert run.rows()[-1]["samples/failed"] == 1
    assert run.rows()[0]["episodes/failed/infra/step"] == 1


def test_above_the_rate_the_run_stops_in_the_environments_words(talks: MakeTalks) -> None:
    run = talks(run__steps=2, task__environment="tests.harness.environments:Broken")
    with pytest.raises(Exception, match="the bank is closed"):
        run.train()


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(6), 6))
def test_a_run_survives_random_faults(talks: MakeTalks, seed: int) -> None:
    run = talks(
        run__steps=25,
        actors__max_staleness=seed % 3,
        actors__count=2 + seed % 2,
        rewards__max_error_rate=0.5,
    )
    everyone = ("rollout", "reward", "environment")
    chaos = Chaos(
        run, seed, actors=everyone, kill=0.0015, freeze=0.0003, out_of_memory=0.0005, lose=0.002
    )
    assert run.train() == 0
    assert len(chaos.done) > 3
    check_episodes(run, 25)
