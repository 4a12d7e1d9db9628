"""Whole runs that change their size by themselves, or because their config.yaml was edited."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cohort.cluster.config import ConfigError
from tests.harness import engine
from tests.harness.test_chaos import check_books
from tests.harness.test_scaling import answer, request
from tests.harness.world import World

MakeWorld = Callable[..., World]


def serving(run: World) -> list[int]:
    return [row["actors/serving"] for row in run.rows()]


@pytest.fixture
def slow_engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tokens take ten times as long, and an engine has room for one group. The keys for that."""
    monkeypatch.setattr(engine, "TOKEN_S", 0.5)
    return {"actors__max_concurrent": 4, "actors__count": 1}


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_grows_while_its_learner_waits(
    world: MakeWorld, slow_engines: dict[str, Any], staleness: int
) -> None:
    run = world(run__steps=20, actors__max_staleness=staleness, actors__max_count=3, **slow_engines)
    assert run.train() == 0
    check_books(run, 20)
    counts = serving(run)
    assert counts[0] == 1
    assert counts[-1] == max(counts) == 3
    assert run.rows()[-1]["samples/failed"] == 0
    # The cluster's autoscaler heard of it: these engines, a rank.
    assert run.ray.requested[-1] == [{"CPU": 0.6}] * 3 + [{"CPU": 0.4}]


@pytest.mark.slow
def test_a_run_shrinks_while_its_learner_never_waits(world: MakeWorld) -> None:
    keys = dict(actors__count=3, actors__min_count=1, actors__max_count=3)
    run = world(run__steps=30, actors__max_staleness=2, **keys)
    run.slow["learner-0"] = 50.0
    assert run.train() == 0
    check_books(run, 30)
    assert (serving(run)[0], serving(run)[-1]) == (3, 1)


def test_what_does_not_fit_is_asked_for_and_comes_when_it_does(
    world: MakeWorld, slow_engines: dict[str, Any]
) -> None:
    run = world(run__steps=16, actors__max_count=4, **slow_engines)

    def free(cpus: float) -> Callable[[Any], None]:
        return lambda _: setattr(run.ray, "free", {"CPU": cpus})

    run.on("step", free(0.5), actor="learner-0", nth=1)
    run.on("step", free(1.1), actor="learner-0", nth=8)
    run.on("step", free(0.0), actor="learner-0", nth=10)
    assert run.train() == 0
    assert max(serving(run)[:8]) == 1
    assert serving(run)[-1] == 2
    assert [{"CPU": 0.6}] * 2 + [{"CPU": 0.4}] in run.ray.requested


def test_a_scaling_by_hand_stays_within_the_bounds(world: MakeWorld) -> None:
    run = world(run__steps=6, actors__count=2, actors__max_count=3)
    request(run, 1, actors=4)
    assert run.train() == 0
    assert not answer(run).done
    assert "actors.max_count=3" in answer(run).text


def edit(run: World, old: str, new: str, nth: int) -> None:
    """Replace a line of the run's config.yaml while its nth step is trained."""

    def replace(_: Any) -> None:
        file = run.folder / "config.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        # Whatever the file system's clock shows.
        os.utime(file, ns=(nth, nth))

    run.on("step", replace, actor="learner-0", nth=nth)


@pytest.mark.slow
def test_an_edit_of_the_config_is_followed(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world(run__steps=30)
    edit(run, "count: 2", "count: 3", nth=3)
    edit(run, "workers: 2", "workers: 1", nth=6)
    edit(run, "temperature: 1.0", "temperature: 0.5", nth=9)
    edit(run, "count: 3", "count: 0", nth=12)
    assert run.train() == 0
    check_books(run, 30)
    assert (serving(run)[0], serving(run)[-1]) == (2, 3)
    said = capsys.readouterr().out
    assert "after step 3: rollout actors 2 -> 3" in said
    assert "after step 6: reward workers 2 -> 1" in said
    assert "follows actors.count and rewards.workers alone" in said
    assert "is not followed" in said and "actors.count" in said.split("is not followed")[1]


def test_a_machine_that_joins_gets_actors_once_weights_reach_it(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Newcomers ask for weights before the next ones are published.
    monkeypatch.setattr(engine, "START_S", 0.1)
    run = world(run__steps=12)
    request(run, 2, actors=4)

    def join(_: Any) -> None:
        run.ray.node_names.append("1" * 56)

    # Its weights are published before anybody knows of the machine.
    run.on("done", join, actor="learner-0", what="publish", nth=4)
    assert run.train() == 0
    check_books(run, 12)
    last = run.rows()[-1]
    assert (last["actors/serving"], last["actors/restarts"]) == (4, 0)


def test_bounds_that_exclude_the_count_are_refused(tmp_path: Path) -> None:
    run = World(tmp_path / "run", tmp_path, actors__count=4, actors__max_count=3)
    with pytest.raises(ConfigError, match=r"actors\.count=4.*actors\.max_count=3"):
        run.config()
