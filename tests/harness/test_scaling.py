"""`cohort scale`: whole runs that grow and shrink, and the command's side of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cohort.cluster import scaling
from cohort.cluster.config import ConfigError
from cohort.cluster.errors import RunError
from cohort.cluster.placement import Resources
from cohort.cluster.run_dir import SCALE_ANSWER, SCALE_REQUEST
from cohort.cluster.scaling import Answer, Request, ask, parse_counts, why_not
from tests.cluster.test_run_dir import holder
from tests.harness.test_chaos import check_books
from tests.harness.world import Chaos, World
from tests.pace import some

MakeWorld = Callable[..., World]


def request(run: World, step: int, **counts: int) -> None:
    """Have a request lie in the folder while this step is trained."""

    def write(_: Any) -> None:
        asked = json.dumps(asdict(Request(f"{step}", **counts)))
        (run.folder / SCALE_REQUEST).write_text(asked)

    run.on("step", write, actor="learner-0", nth=step + 1)


def answer(run: World) -> Answer:
    return Answer(**json.loads((run.folder / SCALE_ANSWER).read_text()))


@pytest.mark.parametrize("staleness", some([2, 0], 2))
def test_a_run_grows_and_shrinks_and_loses_no_group(world: MakeWorld, staleness: int) -> None:
    run = world(run__steps=60, actors__max_staleness=staleness, actors__count=1, rewards__workers=1)
    request(run, 2, actors=3, rewards=3)
    request(run, 40, actors=2)
    request(run, 45, actors=1, rewards=1)
    assert run.train() == 0
    check_books(run, 60)
    rows = run.rows()
    assert rows[-1]["samples/failed"] == rows[-1]["actors/restarts"] == 0
    assert [rows[step]["actors/serving"] for step in (1, 39, 59)] == [1, 3, 1]
    # Nobody was given a group before it had the weights.
    for name in ("rollout-1", "rollout-2"):
        done = [e.what for e in run.events("done", actor=name) if e.what in ("sync", "collect")]
        assert done[0] == "sync"
        assert "collect" in done
    assert run.ray.living("rollout") == []
    assert answer(run) == Answer(
        "45", True, "after step 46: rollout actors 2 -> 1, reward workers 3 -> 1"
    )
    assert not (run.folder / SCALE_REQUEST).exists()


def test_who_leaves_hands_back_what_it_cannot_end_in_time(world: MakeWorld) -> None:
    run = world(run__steps=8, actors__max_staleness=2, actors__group_timeout_s=20)
    # A token takes 15 s from now on.
    run.on("step", lambda _: run.ray.slow.update({"rollout-1": 300.0}), nth=1)
    request(run, 1, actors=1)
    assert run.train() == 0
    check_books(run, 8)
    assert run.rows()[-1]["samples/failed"] == 0
    assert run.rows()[-1]["actors/restarts"] == 0
    assert run.time < 60
    events = run.events("call", "done", actor="rollout-1")
    given = [e.detail["args"][0] for e in events if (e.kind, e.what) == ("call", "submit")]
    ended = [e.detail["args"][0] for e in events if (e.kind, e.what) == ("done", "collect")]
    handed_back = {request.group_id for requests in given for request in requests} - {*ended}
    assert handed_back


@pytest.mark.slow
def test_growing_and_shrinking_in_the_middle_of_deaths_and_freezes(world: MakeWorld) -> None:
    run = world(run__steps=60, actors__max_staleness=1, actors__max_concurrent=16)
    for step, actors in ((3, 4), (15, 1), (25, 3), (40, 2)):
        request(run, step, actors=actors, rewards=actors)
    chaos = Chaos(run, 3, kill=0.003, freeze=0.001, out_of_memory=0.001, lose=0.002)
    assert run.train() == 0
    assert len(chaos.done) > 5
    check_books(run, 60)


def test_what_the_machines_cannot_hold_is_answered_and_changes_nothing(world: MakeWorld) -> None:
    run = world(run__steps=6)
    request(run, 1, actors=99)
    assert run.train() == 0
    said = answer(run)
    assert not said.done
    assert "actors.count=99" in said.text
    assert run.rows()[-1]["actors/serving"] == 2


def test_a_file_that_is_no_request_ends_nothing(world: MakeWorld) -> None:
    run = world(run__steps=3)
    run.on("step", lambda _: (run.folder / SCALE_REQUEST).write_text("{"), nth=1)
    assert run.train() == 0
    assert not (run.folder / SCALE_REQUEST).exists()


@pytest.mark.parametrize("words", [[], ["actors"], ["actors=0"], ["actors=-1"], ["count=3"]])
def test_words_that_ask_for_nothing(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="actors=N"):
        parse_counts(words)


def test_memory_of_more_engines_is_looked_at(world: MakeWorld) -> None:
    config, have = world().config(), Resources(cpus=16, gpus=0, memory=0)
    four = Request("a", actors=4)
    assert why_not(config, four, 2, "cpu", have, 10**9, 64 << 30) == ""
    assert "2 more engines need about" in why_not(config, four, 2, "cpu", have, 10**9, 4 << 30)
    assert "GPUs: needs 5" in why_not(config, four, 2, "cuda", have, 10**9, None)


def test_without_a_run_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        ask(tmp_path, Request("a", 2), 1, print)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match="no run is alive"):
        ask(tmp_path, Request("a", 2), 1, print)
    assert not (tmp_path / SCALE_REQUEST).exists()


@pytest.mark.slow
def test_the_command_waits_for_the_answer_of_a_run_that_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "POLL_S", 0.02)
    monkeypatch.setattr(scaling, "LOOK_S", 0.1)
    driver = holder(tmp_path)
    (tmp_path / "config.yaml").touch()
    said: list[str] = []

    def reply() -> None:
        while not (tmp_path / SCALE_REQUEST).is_file():
            pass
        text = json.dumps(asdict(Answer("a", True, "done so")))
        (tmp_path / SCALE_ANSWER).write_text(text)

    try:
        thread = threading.Thread(target=reply)
        thread.start()
        ask(tmp_path, Request("a", 2), 20, said.append)
        thread.join()
        assert said[0].startswith(f"asked process {driver.pid}")
        assert said[1] == "done so"
        with pytest.raises(RunError, match=r"no answer within 0\.1 s"):
            ask(tmp_path, Request("b", 2), 0.1, said.append)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
def test_a_run_that_ends_leaves_no_request_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "LOOK_S", 0.1)
    driver = holder(tmp_path)
    (tmp_path / "config.yaml").touch()
    try:
        with pytest.raises(RunError, match="ended before it took up"):
            ask(tmp_path, Request("a", 2), 20, lambda _: driver.kill())
        assert not (tmp_path / SCALE_REQUEST).exists()
    finally:
        driver.kill()
        driver.wait()
