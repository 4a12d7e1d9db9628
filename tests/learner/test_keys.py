"""No key of `algorithm` is ignored: a change changes what is computed, or is refused."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, get_args

import pytest
import torch

from cohort.cluster.config import ConfigError, dump_config
from cohort.cluster.config_file import load_config
from cohort.learner.config import (
    CROSS_ENTROPY_NEEDS,
    USED_WHEN,
    AlgorithmConfig,
    LearnerConfig,
)
from cohort.learner.grpo import LossInputs, policy_loss
from cohort.learner.optimizer import lr_at
from cohort.learner.packing import Packer
from cohort.learner.plan import plan_step
from cohort.learner.presets import PRESETS
from tests.learner.episodes import CHAIN, episode_group, episode_metas
from tests.learner.helpers import metas, scored_group

# For every key, values other than any preset's.
CHANGES: dict[str, list[Any]] = {
    "baseline": ["mean", "leave_one_out", "none"],
    "scale": ["group", "batch", "none"],
    "credit": ["episode", "turn"],
    "drop_zero_variance": [True, False],
    "overlong_buffer": [0.7],
    "mask_truncated": [True],
    "dynamic_sampling_rounds": [3],
    "objective": ["clip", "cispo", "dppo_tv", "cross_entropy"],
    "ratio": ["token", "sequence"],
    "anchor": ["learner", "engine"],
    "clip_low": [0.05, 0.6],
    "clip_high": [0.1, 1.5],
    "dual_clip": [None, 1.7],
    "aggregation": ["token", "sequence", "prompt", "constant"],
    "correction": ["truncate", "mask", "off"],
    "correction_cap": [1.1, 4.0],
    "correction_low": [0.1, 0.9],
    "sequence_mask": [(0.9, 1.1)],
    "negative_mask": [0.1],
    "kl_coef": [0.3],
    "kl_estimator": ["k1", "k2", "k3"],
    "kl_in": ["loss", "reward"],
    "reference_refresh_steps": [3],
    "entropy_coef": [0.2],
    "updates_per_step": [2, 3],
    "update_on": ["all", "share"],
}
# Where keys that others switch off are on.
CONTEXTS: list[dict[str, Any]] = [
    *({"preset": preset} for preset in PRESETS),
    {"correction": "mask"},
    {"correction": "off"},
    {"kl_coef": 0.1},
    {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
    {"updates_per_step": 2, "drop_zero_variance": False},
    {"ratio": "sequence", "correction": "off"},
    {"objective": "cispo"},
    {"objective": "dppo_tv"},
    {"anchor": "engine", "correction": "off"},
    {"objective": "cross_entropy"},
]


@cache
def what_it_computes(algorithm: AlgorithmConfig) -> list[Any]:
    """The plan of a step, the loss and gradient of a later update, and the schedules."""
    groups = [
        scored_group("a", [1.0, 0.0, 0.35, 0.2], [12, 11, 30, 5], truncated=(1,)),
        scored_group("b", [0.5, 0.5, 0.5], [4, 4, 19]),
        scored_group("c", [0.0, 1.0, 1.0, 0.0, 2.0], [1, 2, 30, 4, 8]),
    ]
    on = algorithm.kl_coef > 0
    kl = {c.id: 0.01 * len(c.token_ids) for g in groups for c in g.group.completions}
    # The turns of an episode tell apart which of its rewards came first.
    episodes = episode_group("dd", [CHAIN, CHAIN], [1.0, 0.2])
    plan = plan_step(
        [
            *(metas(group) for group in groups),
            episode_metas(episodes, [(0.0, 1.0, 0.0), (0.5, 0.0, 0.0)]),
        ],
        algorithm,
        Packer(ranks=1, micro_batch_tokens=8192),
        max_tokens=32,
        kl=kl if on and algorithm.kl_in == "reward" else None,
    )
    found: list[Any] = [plan]
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, spread: float) -> torch.Tensor:
        return torch.randn(n, generator=generator) * spread

    lengths = [9, 4, 12, 7, 1, 8, 5, 6]
    n = sum(lengths)
    now = -torch.rand(n, generator=generator) * 2

    def each(values: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(values, torch.tensor(lengths))

    level = each(draw(len(lengths), 0.3))
    logprobs = now.clone().requires_grad_()
    # Completions of both signs that the policy has left far behind, as no bound would let it.
    advantages = each(torch.tensor([0.7, -1.1, 0.4, -0.9, 1.3, -0.6, 0.8, -0.2]))
    far = each(torch.tensor([-3.0, -3.0, 2.0, 2.0, 0.0, 0.5, 0.0, 0.3]))
    entropy = torch.rand(n, generator=generator).requires_grad_()
    inputs = LossInputs(
        logprobs,
        now + far + level + draw(n, 0.5),
        advantages,
        torch.full((n,), 1 / n),
        torch.repeat_interleave(torch.tensor(lengths)),
        entropy_T=entropy,
        old_T=now + far + 0.3 * level + draw(n, 0.4),
        reference_T=now + draw(n, 0.3) if on and algorithm.kl_in == "loss" else None,
    )
    loss, _ = policy_loss(inputs, algorithm)
    loss.backward()
    slope = torch.zeros(n) if entropy.grad is None else entropy.grad
    found += [loss.item(), logprobs.grad.tolist(), slope.tolist()]
    found.append([algorithm.refreshes_reference(step) for step in range(500)])
    # tests/cluster/test_stream.py::test_groups_without_gradient_are_replaced_in_bounded_rounds
    found.append(algorithm.dynamic_sampling_rounds)
    return found


def test_every_key_is_tried() -> None:
    assert set(CHANGES) == set(AlgorithmConfig.model_fields) - {"preset"}
    assert set(USED_WHEN) <= set(CHANGES)


@pytest.mark.parametrize("key", sorted(CHANGES))
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_a_change_has_an_effect_or_is_refused(context: dict[str, Any], key: str) -> None:
    base = AlgorithmConfig(**context)
    assert base.contradictions() == []
    before = what_it_computes(base)
    tried = 0
    for value in CHANGES[key]:
        if value == getattr(base, key):
            continue
        tried += 1
        changed = AlgorithmConfig(**{**context, key: value})
        assert getattr(changed, key) == value
        if not changed.contradictions():
            assert what_it_computes(changed) != before, (key, value)
    assert tried


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"preset": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"preset": "dppo_tv", "dual_clip": 5.0}, "dual_clip"),
        ({"objective": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"preset": "cispo", "clip_low": 0.1}, "clip_low"),
        ({"correction_low": 0.1}, "correction_low"),
        ({"correction": "off", "correction_cap": 5.0}, "correction_cap"),
        ({"preset": "dppo_tv", "correction_cap": 5.0}, "correction_cap"),
        ({"preset": "gspo", "correction_cap": 5.0}, "correction_cap"),
        ({"kl_estimator": "k2"}, "kl_estimator"),
        ({"kl_in": "reward", "kl_estimator": "k1"}, "kl_in"),
        ({"reference_refresh_steps": 5}, "reference_refresh_steps"),
        ({"update_on": "share"}, "update_on"),
        ({"preset": "gspo", "correction": "truncate"}, "correction"),
        ({"ratio": "sequence"}, "correction"),
    ],
)
def test_a_key_without_effect_is_refused(given: dict[str, Any], key: str) -> None:
    problems = AlgorithmConfig(**given).contradictions()
    assert any(line.startswith(f"algorithm.{key}=") for line in problems), problems
    overrides = [f"algorithm.{name}={value}" for name, value in given.items()]
    with pytest.raises(ConfigError, match=rf"algorithm\.{key}="):
        load_config(None, ["model.path=x", *overrides])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_written_out_in_full_is_read_again(preset: str, tmp_path: Any) -> None:
    """`config.yaml` of a run holds every key; the usual value of an unused one is no mistake."""
    config = load_config(None, ["model.path=x", f"algorithm.preset={preset}"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_the_usual_value_of_an_unused_key_is_harmless() -> None:
    for given in (
        {"correction": "off", "correction_cap": 2.0, "correction_low": 0.5},
        {"kl_coef": 0.0, "kl_estimator": "k3", "kl_in": "loss", "reference_refresh_steps": 0},
        {"preset": "cispo", "clip_low": 0.2, "dual_clip": None},
        {"preset": "r1", "kl_coef": 0.0},
        {"updates_per_step": 1, "update_on": "all"},
    ):
        assert AlgorithmConfig(**given).contradictions() == []


def test_presets_set_only_what_they_use() -> None:
    for preset, values in PRESETS.items():
        algorithm = AlgorithmConfig(preset=preset)
        for key, (used, _) in USED_WHEN.items():
            assert used(algorithm) or values.get(key) is None, (preset, key)


def test_demonstrations_use_no_other_key() -> None:
    assert set(CROSS_ENTROPY_NEEDS) == set(CHANGES) - {"objective"}
    for key, values in CHANGES.items():
        for value in values:
            if key != "objective" and value != CROSS_ENTROPY_NEEDS[key]:
                given = {"objective": "cross_entropy", key: value}
                [problem] = AlgorithmConfig(**given).contradictions()
                assert problem.startswith(f"algorithm.{key}=")


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr_final", 0.5), ("lr_schedule", "linear"), ("warmup_steps", 3), ("learning_rate", 2e-6)],
)
@pytest.mark.parametrize("schedule", get_args(LearnerConfig.model_fields["lr_schedule"].annotation))
def test_the_schedule_uses_its_keys_or_refuses_them(schedule: Any, key: str, value: Any) -> None:
    base = LearnerConfig(lr_schedule=schedule, warmup_steps=2)
    changed = base.model_copy(update={key: value})
    if changed == base:
        return
    rates = [[lr_at(update, learner, 20) for update in range(1, 21)] for learner in (base, changed)]
    refused = [line for line in changed.contradictions() if f"learner.{key}" in line]
    assert (rates[0] != rates[1]) != bool(refused)
    assert all(math.isfinite(rate) for rate in rates[1])
