"""The loop's promises, on whole runs: what happens in which order, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from cohort.actors.records import Failure, Group, Prompt, WeightsInfo
from cohort.actors.rollout import RolloutActor
from cohort.actors.weight_file import TensorSpec
from cohort.cluster.requests import group_request
from cohort.learner.weights import WeightFiles
from tests.harness import policy
from tests.harness.engine import engine_spec
from tests.harness.local_ray import NODE, Event, LocalRay
from tests.harness.world import World, in_cluster

MakeWorld = Callable[..., World]


def test_the_six_steps_come_in_their_order(world: MakeWorld) -> None:
    run = world(run__steps=3, run__checkpoint_every=2, actors__count=1, rewards__workers=1)
    assert run.train() == 0
    seen = []
    for event in run.ray.events:
        if event.kind in ("publish", "update", "step", "save"):
            seen.append(event.kind)
        elif event.kind == "call" and event.what in ("submit", "score"):
            seen.append(event.what)
    step = ["submit", "score", "step", "publish", "update"]
    assert [kind for kind, _ in groupby(seen)] == [
        *["publish", "update"],
        *step,
        *step,
        "save",
        *step,
        "save",
    ]


@pytest.mark.parametrize("staleness", [0, 1, 2, 3, 4])
def test_completions_are_as_old_as_allowed_and_never_older(
    world: MakeWorld, staleness: int
) -> None:
    run = world(run__steps=8, actors__max_staleness=staleness)
    assert run.train() == 0
    for row in run.rows():
        step = row["step"]
        # As far ahead as allowed: what is there before the learner has caught up waits for it.
        assert row["async/staleness_max"] == min(step, staleness)
        for sample in run.rollouts(step):
            assert sample["weight_versions"][0] == max(0, step - staleness)
            assert sample["weight_versions"][1] <= step


def test_every_token_knows_the_weights_that_it_came_from(world: MakeWorld) -> None:
    """Its log-prob is that of these weights, and of no others."""
    run = world(run__steps=6, actors__max_staleness=2, actors__max_tokens=80)
    weights: dict[int, policy.Weights] = {}

    def keep(event: Event) -> None:
        weights[len(weights)] = policy.read(event.what)

    run.on("update", keep, actor="rollout-0")
    run.slow = {"rollout-0": 5.0}
    groups: list[Group] = []
    run.on(
        "done", lambda e: groups.append(e.detail["answer"][1]), actor="rollout-0", what="collect"
    )
    assert run.train() == 0
    spanned = 0
    for group in groups:
        for completion in group.completions:
            versions = [v for version, count in completion.spans for v in [version] * count]
            assert len(versions) == len(completion.token_ids)
            assert completion.weight_versions == (versions[0], versions[-1])
            assert versions == sorted(versions)
            spanned += len(completion.spans) > 1
            prompt = list(group.prompt.token_ids)
            for version, token, logprob in zip(
                versions, completion.token_ids, completion.logprobs, strict=True
            ):
                state = policy.state(weights[version], prompt)
                expected = policy.distribution(weights[version], state, 1.0)[token]
                assert logprob == pytest.approx(expected, abs=1e-6)
    assert spanned > 5


@pytest.mark.parametrize("staleness", [1, 3])
def test_what_is_trained_is_as_long_as_what_is_generated(world: MakeWorld, staleness: int) -> None:
    """Long completions arrive late, and are neither left out nor left behind."""
    run = world(
        run__steps=8,
        actors__max_staleness=staleness,
        actors__max_tokens=60,
        actors__max_concurrent=4,
        model__max_length=128,
    )
    assert run.train() == 0
    generated = {
        name: tokens
        for event in run.events("done", actor="rollout")
        if event.what == "collect"
        for meta, _ in [event.detail["answer"]]
        for name, tokens in zip(meta.completion_ids, meta.completion_tokens, strict=True)
    }
    recorded = {
        sample["completion_id"]: len(sample["token_ids"])
        for row in run.rows()
        for sample in run.rollouts(row["step"])
    }
    assert recorded == generated
    assert len(generated) == 8 * 16
    last = run.rows()[-1]
    assert last["samples/trained"] + last["samples/filtered"] == 8 * 16
    assert max(generated.values()) > 5 * min(generated.values())


def test_every_step_generates_with_the_weights_of_the_step_before(world: MakeWorld) -> None:
    run = world(run__steps=6)
    assert run.train() == 0
    assert [e.detail["version"] for e in run.events("publish")] == list(range(7))
    for row in run.rows():
        assert row["weights/version"] == row["step"] + 1
        for sample in run.rollouts(row["step"]):
            assert sample["weight_versions"] == [row["step"], row["step"]]
        # The engines' own log-probs are the learner's: other weights, or a prompt that was
        # computed with other weights, would show here.
        assert row["mismatch/logprob_abs_max"] < 1e-4
        assert row["mismatch/probe_gap"] < 1e-6


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_prefix_cache_is_reset_at_every_update(world: MakeWorld, staleness: int) -> None:
    # Prompts come back: 15 of them in 6 steps of 8.
    options = '{"max_operand": 4}'
    run = world(
        run__steps=6,
        actors__max_staleness=staleness,
        task__prompts_per_step=8,
        task__options=options,
    )
    assert run.train() == 0
    for actor in ("rollout-0", "rollout-1"):
        kinds = [e.kind for e in run.events("update", "reset", actor=actor)]
        assert kinds == ["update", "reset"] * 7


def test_an_actor_refuses_weights_older_than_its_own(world: MakeWorld, tmp_path: Path) -> None:
    spec = engine_spec(world().model)

    def publish(files: WeightFiles, version: int) -> WeightsInfo:
        weights = policy.initial(384, seed=version)
        tensors = policy.as_tensors(weights)
        specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
        digest, size = files.publish(version, [0, 1, 2], specs, tensors.items())
        path = str(files.path(version))
        return WeightsInfo(version, tuple(tensors), digest, size, path, NODE)

    async def main(ray: LocalRay) -> None:
        files = WeightFiles(tmp_path / "published")
        infos = [publish(files, version) for version in range(3)]
        actor = ray.remote(RolloutActor).remote("rollout-0", spec, str(tmp_path))
        await actor.start.remote((0,))
        probe = [1, 5, 6]
        for version in (1, 2):
            expected = policy.score(policy.initial(384, seed=version), probe)
            assert await actor.sync.remote(infos[version], probe) == pytest.approx(expected)
        for version in (0, 1):
            refused = await actor.sync.remote(infos[version], probe)
            assert isinstance(refused, Failure)
            assert "older" in refused.message
        # What it holds is untouched.
        assert await actor.sync.remote(infos[2], probe) == pytest.approx(expected)

    in_cluster(main)


def test_a_groups_seed_is_its_own_in_every_step_and_for_every_prompt(world: MakeWorld) -> None:
    config = world().config()
    prompts = [Prompt(f"0-{i}", (1, 2), "words") for i in range(3)]
    seeds = {group_request(config, step, p).sampling.seed for step in range(3) for p in prompts}
    assert len(seeds) == 9
    other = world().config(run__seed=1)
    assert group_request(other, 0, prompts[0]).sampling.seed not in seeds
