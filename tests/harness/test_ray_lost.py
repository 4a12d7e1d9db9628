"""Ray's own processes die under a run: it ends within seconds, and saves what still answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import cohort.cluster.launch
from cohort.cluster.errors import RayLostError
from cohort.cluster.ray_watch import Look, Server
from cohort.learner.checkpoint import latest
from tests.harness.world import World

MakeWorld = Callable[..., World]


class Servers:
    """Ray's servers, which tests let die."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.looks: dict[str, Look] = {"raylet": "alive", "gcs_server": "alive"}
        patch.setattr(cohort.cluster.launch, "ray_servers", lambda joined: self.all(joined))

    def all(self, joined: bool) -> dict[str, Server]:
        assert not joined, "this Ray was started by the run"
        return {name: self._server(name) for name in self.looks}

    def _server(self, name: str) -> Server:
        async def look() -> Look:
            return self.looks[name]

        return look

    def die(self, name: str) -> None:
        self.looks[name] = "dead"


def test_without_a_gcs_the_run_saves_what_the_learner_has_done(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, run = Servers(monkeypatch), world(run__steps=50)
    run.on("step", lambda _: servers.die("gcs_server"), nth=3)
    with pytest.raises(RayLostError, match="gcs_server died"):
        run.train()
    assert run.state()["step"] == 3
    servers.looks["gcs_server"] = "alive"
    run.forget_hooks()
    assert run.train(run__resume=True, run__steps=6) == 0
    assert [row["step"] for row in run.rows()] == list(range(6))


def test_without_a_gcs_a_learner_that_does_not_answer_is_not_waited_for(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, run = Servers(monkeypatch), world(run__steps=50)
    run.on("step", lambda _: servers.die("gcs_server"), nth=3)
    run.on("call", lambda event: run.ray.freeze(event.actor), what="save")
    with pytest.raises(RayLostError):
        run.train()
    assert run.time < 120


def test_without_a_raylet_nothing_is_waited_for(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray does not say so: the calls of the run would hang for ever."""
    servers, run = Servers(monkeypatch), world(run__steps=50)

    def die(_: object) -> None:
        servers.die("raylet")
        for name in ("rollout-0", "rollout-1", "learner-0", "reward-0", "reward-1"):
            run.ray.freeze(name)

    run.on("call", die, what="step", nth=3)
    with pytest.raises(RayLostError, match="raylet died"):
        run.train()
    assert run.time < 60
    assert latest(run.folder / "checkpoints") is None


def test_a_raylet_that_dies_during_the_start_ends_the_start(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, run = Servers(monkeypatch), world(run__steps=2)

    def die(event: object) -> None:
        servers.die("raylet")
        run.ray.freeze(event.actor)  # type: ignore[attr-defined]

    run.on("call", die, actor="rollout-0", what="start")
    with pytest.raises(RayLostError):
        run.train()
    assert run.time < 60
    servers.looks["raylet"] = "alive"
    run.forget_hooks()
    assert run.train() == 0


def test_a_run_that_is_stopped_while_it_is_watched_saves(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    Servers(monkeypatch)
    run = world(run__steps=50)
    run.on("step", lambda _: run.stop(), nth=3)
    assert run.train() == 0
    assert run.state()["step"] == 3
