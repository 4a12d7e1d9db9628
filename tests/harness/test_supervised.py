"""Histories of supervised runs: thousands with a run of a few lines, some with the real loop."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cohort.actors.errors import TRY_AGAIN
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.supervise import LONGEST_PAUSE_S, Again, Starts, Supervisor, recorded_steps
from tests.harness.test_resume import drawn, same_weights, without_times
from tests.harness.world import World
from tests.pace import some

MakeWorld = Callable[..., World]
STEPS, EVERY, LIMIT = 20, 5, 3


class History(Supervisor):
    """A supervisor whose driver, signals and clock are drawn from a seed.

    The driver makes a step a second, saves every few steps, and writes metrics of each. It dies at
    random, and in some histories at one step always.
    """

    def __init__(self, folder: Path, config: Config, seed: int) -> None:
        self.chance = random.Random(seed)
        super().__init__(lambda again: [str(again)], folder, config, lambda _: None)
        self.death = self.chance.choice([0.0, 0.05, 0.3])
        self.stuck_at = self.chance.choice([None, None, self.chance.randrange(STEPS)])
        self.asked_at = self.chance.choice([None, self.chance.uniform(0, 100)])
        self.fails_at = self.chance.choice([None, None, None, self.chance.randrange(STEPS)])
        self.now, self.saved, self.furthest = 0.0, 0, 0
        # Of every start: whether it resumed, the code that it ended with, the furthest step so far.
        self.starts: list[tuple[str, int, int]] = []
        self.pauses: list[float] = []
        self.cleaned = 0

    def clock(self) -> float:
        return self.now

    def _one_start(self, again: bool, heard: set[signal.Signals]) -> int:
        del heard
        code = self._drive()
        self.starts.append((self._start(again)[0], code, self.furthest))
        return code

    def _drive(self) -> int:
        self.now += 30
        step = self.saved
        while step < STEPS:
            self.now += 1
            if self.asked_at is not None and self.now >= self.asked_at:
                self._asked = signal.SIGTERM
                self.saved = step
                return 128 + signal.SIGTERM
            if step == self.fails_at:
                return 1
            if step == self.stuck_at or self.chance.random() < self.death:
                return self.chance.choice([-signal.SIGKILL, -signal.SIGSEGV, TRY_AGAIN])
            step += 1
            lines = "".join(f'{{"step": {n}}}\n' for n in range(step))
            (self._folder / "metrics.jsonl").write_text(lines)
            self.furthest = max(self.furthest, step)
            if step % EVERY == 0:
                self.saved = step
        return 0

    def _hear(self, numbers: set[signal.Signals], timeout_s: float) -> int | None:
        del numbers
        self.pauses.append(timeout_s)
        self.now += timeout_s
        if self.asked_at is not None and self.now >= self.asked_at:
            self._asked = signal.SIGTERM
        return self._asked

    def _clean(self) -> None:
        self.cleaned += 1


def lost(code: int) -> bool:
    return code < 0 or code == TRY_AGAIN


def most_in_a_row(starts: list[tuple[str, int, int]]) -> int:
    """The most lost starts in a row of which none but the first got further than before."""
    row, most, best = 0, 0, 0
    for _, code, furthest in starts:
        if not lost(code):
            break
        row = 1 if furthest > best else row + 1
        best, most = max(best, furthest), max(most, row)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_thousands_of_histories_end_as_they_should(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["model.path=/none", f"cluster.restarts={LIMIT}"])
    ends: set[int] = set()
    for seed in range(500 * block, 500 * block + 500):
        folder = tmp_path / str(seed)
        folder.mkdir()
        history = History(folder, config, seed)
        monkeypatch.setattr(time, "monotonic", history.clock)
        code = history._run(set())
        ends.add(code)
        starts, row = history.starts, most_in_a_row(history.starts)
        said = f"seed {seed}: {starts}"
        assert [resumed for resumed, _, _ in starts] == ["False"] + ["True"] * (len(starts) - 1), (
            said
        )
        assert history.cleaned == sum(lost(ended) for _, ended, _ in starts), said
        assert all(pause <= LONGEST_PAUSE_S for pause in history.pauses), said
        assert row <= LIMIT + 1, said
        if code == 0:
            assert recorded_steps(folder) == STEPS, said
        elif code == TRY_AGAIN:
            assert history._asked is not None, said
        elif row == LIMIT + 1:
            assert code == 1, said
        else:
            assert (code, starts[-1][1]) == (1, 1), said
    assert ends == {0, 1, TRY_AGAIN}


KILLS = ("publish", "submit", "score_part", "collect", "step", "sync", "prepare_save", "write")


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(4), 4))
def test_a_driver_that_is_killed_again_and_again_makes_the_same_run(
    world: MakeWorld, seed: int
) -> None:
    """The real loop, killed at a random call of every start, as the supervisor goes on with it."""
    keys = {"run__steps": 6, "run__checkpoint_every": 2, "actors__count": 1, "rewards__workers": 1}
    straight, killed = world("straight", **keys), world("killed", **keys)
    assert straight.train() == 0
    chance, starts, codes = random.Random(seed), Starts(limit=4), []
    while True:
        killed.forget_hooks()
        if len(codes) < 3:
            what, nth = chance.choice(KILLS), chance.randint(1, 3)
            killed.on("call", lambda _: os.kill(os.getpid(), signal.SIGKILL), what=what, nth=nth)
        codes.append(killed.train_in_child(run__resume=bool(codes)))
        decided = starts.after(codes[-1], recorded_steps(killed.folder), None)
        if not isinstance(decided, Again):
            break
    assert decided.code == 0, codes
    assert -signal.SIGKILL in codes
    assert without_times(killed.rows()) == without_times(straight.rows())
    assert drawn(killed, range(6)) == drawn(straight, range(6))
    assert same_weights(killed, straight)
