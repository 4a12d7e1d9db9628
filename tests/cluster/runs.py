"""Run directories for tests, written by the code that writes real ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cohort.actors.records import Completion, Group, Prompt, RewardError, ScoredGroup
from cohort.cluster.config import dump_config
from cohort.cluster.config_file import load_config
from cohort.cluster.observe.metrics_file import STEP_KEYS
from cohort.cluster.observe.rollouts import RolloutRow, rollout_file

FUNCTIONS = ("accuracy", "format", "travel/cultural_richness")


def metrics_row(step: int, rng: random.Random, total: int) -> dict[str, Any]:
    """A step of a run that learns: rewards rise, groups without signal and truncation change."""
    progress = 1 / (1 + math.exp(-8 * (step / total - 0.4)))
    times = {
        "generate": 3.1 + rng.random(),
        "reward": 0.2 + 0.1 * rng.random(),
        "train": 5.5 + 0.5 * rng.random(),
        "sync": 0.4 + 0.1 * rng.random(),
        "wait": 0.05,
    }
    return {
        **dict.fromkeys(STEP_KEYS, 0.5),
        "step": step,
        "reward/mean": 0.15 + 0.55 * progress + rng.gauss(0, 0.05),
        "reward/std": 0.45,
        "reward/zero_variance_fraction": min(1.0, max(0.0, 0.5 - 0.4 * progress)),
        "rollout/completion_tokens": 900 - 400 * progress + rng.gauss(0, 40),
        "rollout/tokens_per_s": 350 + rng.gauss(0, 20),
        "rollout/truncated_fraction": min(1.0, max(0.0, 0.6 - 0.5 * progress)),
        "learner/loss": rng.gauss(0, 0.05),
        "learner/grad_norm": 2 + rng.random(),
        "learner/tokens_per_s": 120 + rng.gauss(0, 5),
        "mismatch/k3_kl": 0.0015 + 0.0002 * rng.random(),
        **{f"reward/{name}": progress + rng.gauss(0, 0.03) for name in FUNCTIONS},
        "rewards/latency_p99": 0.3 + 0.1 * rng.random(),
        **{f"time/{name}": value for name, value in times.items()},
        "time/step": sum(times.values()),
        "samples/admitted": 64 * (step + 1),
        "samples/trained": 44 * (step + 1),
        "samples/filtered": 19 * (step + 1),
        "samples/failed": step + 1,
    }


def scored_group(
    name: str,
    question: str,
    texts: Sequence[str],
    rewards: Sequence[float | None],
    functions: Sequence[str] = ("accuracy",),
    version: int = 0,
) -> ScoredGroup:
    """A group whose functions all give the total; where it is None, the first one raised."""
    completions = tuple(
        Completion(
            id=f"{name}/{i}",
            prompt_id=name,
            token_ids=np.arange(1 + len(text) // 4, dtype=np.int64),
            logprobs=np.zeros(1 + len(text) // 4, dtype=np.float32),
            finish_reason="length" if i % 3 == 2 else "stop",
            seed=i,
            weight_versions=(version, version),
            text=text,
        )
        for i, text in enumerate(texts)
    )
    prompt = Prompt(
        id=name,
        token_ids=tuple(range(12)),
        content=[
            {"role": "system", "content": "You are a helpful travel planner."},
            {"role": "user", "content": question},
        ],
    )
    errors = tuple(
        RewardError(functions[0], completions[i].id, "raised", "ValueError: no number in <b>")
        for i, reward in enumerate(rewards)
        if reward is None
    )
    values = {function: tuple(rewards) for function in functions}
    return ScoredGroup(Group(name, prompt, completions), values, tuple(rewards), errors)


def write_rollouts(folder: Path, step: int, groups: Sequence[ScoredGroup]) -> list[RolloutRow]:
    """Write rollouts/step-NNNNNN.jsonl; returns its rows."""
    with rollout_file(folder, step) as add:
        return [row for scored in groups for row in add(scored)]


def write_run(
    folder: Path, rows: Sequence[dict[str, Any]], *overrides: str, steps: int | None = None
) -> Path:
    """config.yaml and metrics.jsonl; rollouts/ stays empty."""
    (folder / "rollouts").mkdir(parents=True)
    config = load_config(
        None, ["model.path=some/model", f"run.steps={steps or max(1, len(rows))}", *overrides]
    )
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lively_run(folder: Path, steps: int, group_size: int = 8, words: int = 60) -> Path:
    """A whole run of `steps` steps, 6 groups each, some of whose prompts come again."""
    rng = random.Random(0)
    rows = [metrics_row(step, rng, steps) for step in range(steps)]
    write_run(folder, rows, f"task.group_size={group_size}", steps=steps + 20)
    vocabulary = ["Kyoto", "temple", "ryokan", "<b>budget</b>", "day 1:", "東京", "train", "寺"]
    for step in range(steps):
        groups = []
        for place in range(6):
            again = place == 0
            question = (
                "Plan a 5-day trip to Japan, including Kyoto and Tokyo, under $2,000."
                if again
                else f"What is {step} + {place}? Reply with the number only."
            )
            texts = [" ".join(rng.choices(vocabulary, k=words)) for _ in range(group_size)]
            rewards: list[float | None] = [
                round(rng.random() * (step + 1) / steps, 2) for _ in range(group_size)
            ]
            if place == 1:
                rewards = [0.0] * group_size
            if place == 2:
                rewards[0] = None
            groups.append(
                scored_group(f"{step}:{place}", question, texts, rewards, FUNCTIONS, step)
            )
        write_rollouts(folder / "rollouts", step, groups)
    return folder
