"""docs/algorithms.md is right: every number on it is computed again by the real functions."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from cohort.actors.records import GroupMeta, ScoreMeta
from cohort.actors.turns import TurnShape
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import AlgorithmConfig
from cohort.learner.corrections import engine_weights, sequence_means
from cohort.learner.credit import shaped_rewards
from cohort.learner.grpo import LossInputs, policy_loss
from cohort.learner.objectives import kl_penalty, token_objective
from cohort.learner.packing import Packer, Segment
from cohort.learner.plan import plan_step
from cohort.learner.presets import PRESETS, Preset
from tests.learner.episodes import episode_group, episode_metas

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
MAX_TOKENS = 10
POLICIES = ("now", "old", "engine", "reference")


@cache
def sections() -> dict[str, str]:
    """The text under each heading of the second level; a preset's heading is its name in code."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    return {title.strip("` "): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def table(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column has this name."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    [start] = [i for i, cells in enumerate(lines) if cells[0] == first]
    found = []
    for cells in lines[start + 2 :]:
        if len(cells) != len(lines[start]):
            break
        found.append(dict(zip(lines[start], cells, strict=True)))
    return found


def tokens_of(name: str) -> list[str]:
    """`A1.1` is one token, `A3.1 to A3.9` are nine."""
    first, _, last = name.partition(" to ")
    completion, _, low = first.partition(".")
    high = last.partition(".")[2] or low
    return [f"{completion}.{i}" for i in range(int(low), int(high) + 1)]


@cache
def inputs() -> tuple[list[tuple[GroupMeta, ScoreMeta]], dict[str, dict[str, float]]]:
    """The example's groups, and the log-probs of every token under each policy."""
    text = sections()["The example"]
    tokens = {
        token: {policy: float(row[policy]) for policy in POLICIES}
        for row in table(text, "token")
        for token in tokens_of(row["token"])
    }
    groups = []
    completions = table(text, "completion")
    for name in dict.fromkeys(row["completion"][0] for row in completions):
        rows = [row for row in completions if row["completion"][0] == name]
        ids = tuple(row["completion"] for row in rows)
        lengths = tuple(int(row["tokens"]) for row in rows)
        for completion, length in zip(ids, lengths, strict=True):
            assert [t for t in tokens if t.startswith(f"{completion}.")] == [
                f"{completion}.{i + 1}" for i in range(length)
            ]
        meta = GroupMeta(name, 1, ids, lengths, (False,) * len(ids), (0, 0), "a", 0.0)
        totals = tuple(float(row["reward"]) for row in rows)
        groups.append((meta, ScoreMeta(name, totals, {}, (), 0.0)))
    return groups, tokens


@cache
def segments(preset: Preset) -> dict[str, Segment]:
    groups, _ = inputs()
    plan = plan_step(
        groups,
        AlgorithmConfig(preset=preset),
        Packer(ranks=1, micro_batch_tokens=8192),
        max_tokens=MAX_TOKENS,
    )
    [[batches]] = plan.updates
    return {segment.completion_id: segment for batch in batches for segment in batch.segments}


@cache
def computed(preset: Preset) -> tuple[dict[str, dict[str, float]], float]:
    """What the functions of the loss give every trained token, and the loss of all."""
    algorithm = AlgorithmConfig(preset=preset)
    _, logprobs = inputs()
    trained = segments(preset)
    names = [name for name in logprobs if name.partition(".")[0] in trained]
    of = [trained[name.partition(".")[0]] for name in names]
    now, old, engine, reference = (
        torch.tensor([logprobs[name][policy] for name in names], dtype=torch.float64)
        for policy in POLICIES
    )
    advantages = torch.tensor([segment.advantage for segment in of], dtype=torch.float64)
    weights = torch.tensor([segment.weight for segment in of], dtype=torch.float64).requires_grad_()
    order = list(trained)
    sequence = torch.tensor([order.index(segment.completion_id) for segment in of])
    given = LossInputs(now, engine, advantages, weights, sequence, old_T=old, reference_T=reference)
    loss, _ = policy_loss(given, algorithm)
    # The loss is a weighted sum over tokens: its slope times the weight is a token's part.
    loss.backward()
    parts = (weights.grad * weights.detach()).tolist()
    mask = torch.ones(len(names), dtype=torch.bool)
    log_ratio = now - (engine if algorithm.anchor == "engine" else old)
    own_ratio = log_ratio
    if algorithm.ratio == "sequence":
        log_ratio = sequence_means(log_ratio, sequence, mask)
    objective, _ = token_objective(now, log_ratio, advantages, algorithm)
    columns = {
        "ratio": log_ratio.exp().tolist(),
        "objective": objective.tolist(),
        "w": engine_weights(old - engine, sequence, mask, algorithm).tolist(),
        "loss": parts,
    }
    if algorithm.kl_coef:
        columns["KL"] = kl_penalty(now, reference, own_ratio, "k3").tolist()
    return {
        name: {column: values[i] for column, values in columns.items()}
        for i, name in enumerate(names)
    }, loss.item()


def near(text: str) -> Any:
    """Equal to what is written, as far as it is written."""
    digits = len(text.partition(".")[2])
    return pytest.approx(float(text), abs=0.5001 * 10**-digits)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_advantages_and_weights(preset: Preset) -> None:
    algorithm = AlgorithmConfig(preset=preset)
    trained = segments(preset)
    rows = table(sections()[preset], "completion")
    groups, _ = inputs()
    shaped = {
        name: reward
        for meta, scores in groups
        for name, reward in zip(
            meta.completion_ids, shaped_rewards(meta, scores, algorithm, MAX_TOKENS), strict=True
        )
    }
    assert [row["completion"] for row in rows] == list(shaped)
    for row in rows:
        name = row["completion"]
        assert shaped[name] == near(row["reward"])
        if name not in trained:
            assert row["advantage"] == row["weight of a token"] == "left out"
            continue
        assert trained[name].advantage == near(row["advantage"])
        assert trained[name].weight == near(row["weight of a token"])


@pytest.mark.parametrize("preset", get_args(Preset))
def test_the_loss_of_every_token(preset: Preset) -> None:
    found, loss = computed(preset)
    rows = table(sections()[preset], "token")
    written = [token for row in rows for token in tokens_of(row["token"])]
    # Group B, with an advantage of 0 and no distance to anything, gives nothing.
    assert written == [name for name in found if name.startswith("A")]
    assert all(abs(found[name]["loss"]) < 1e-12 for name in found if name not in written)
    for row in rows:
        assert set(row) == {"token", *found[written[0]]}
        for token in tokens_of(row["token"]):
            for column, value in found[token].items():
                assert value == near(row[column]), (token, column)
    [total] = re.findall(r"Loss of the update: \*\*(-?[\d.]+)\*\*", sections()[preset])
    assert loss == near(total)
    added = sum(float(row["loss"]) * len(tokens_of(row["token"])) for row in rows)
    assert added == pytest.approx(loss, abs=1e-4)


@cache
def episodes(credit: str) -> dict[str, tuple[float, float]]:
    """Of every turn of the example, (advantage, weight of a token), as the tensors have them."""
    rows = table(sections()["credit: turn"], "turn")
    shapes: dict[str, list[TurnShape]] = {}
    own: dict[str, list[float]] = {}
    functions: dict[str, float] = {}
    for row in rows:
        name = row["turn"].partition(".")[0]
        turns = shapes.setdefault(name, [])
        parent = len(turns) - 1 if turns else None
        kept = turns[-1].end if turns else 1
        turns.append(TurnShape(parent, kept, int(row["inserted"]), int(row["sampled"])))
        own.setdefault(name, []).append(float(row["environment"]))
        functions[name] = functions.get(name, 0.0) + float(row["functions"])
    group = episode_group(
        "C", [tuple(turns) for turns in shapes.values()], [*functions.values()], 1
    )
    plan = plan_step(
        [episode_metas(group, [tuple(turns) for turns in own.values()])],
        AlgorithmConfig(credit=credit),
        Packer(ranks=1, micro_batch_tokens=8192),
        max_tokens=MAX_TOKENS,
    )
    [[[batch]]] = plan.updates
    tensors = build_micro_batch(batch, {"C": group})
    pairs = list(zip(tensors.advantage_T.tolist(), tensors.weight_T.tolist(), strict=True))
    found, start = {}, 0
    for segment in batch.segments:
        name = f"C{int(segment.completion_id.partition('/')[2]) + 1}"
        for i, turn in enumerate(segment.turns):
            [found[f"{name}.{i + 1}"]] = set(pairs[start : start + turn.sampled])
            start += turn.sampled
    return found


def test_the_turns_of_episodes() -> None:
    rows = table(sections()["credit: turn"], "turn")
    assert [row["turn"] for row in rows] == sorted(episodes("turn"))
    for row in rows:
        assert near(row["reward"]) == float(row["environment"]) + float(row["functions"])
        advantage, weight = episodes("turn")[row["turn"]]
        assert advantage == near(row["advantage"])
        assert weight == near(row["weight of a token"])
        assert episodes("episode")[row["turn"]] == (near(row["by episode"]), weight)


def test_what_is_to_be_computed_by_hand_comes_out() -> None:
    """Every line `expression = number` of the blocks that are Python."""
    names = {"exp": math.exp, "sqrt": math.sqrt, "min": min, "max": max}
    for preset in (*PRESETS, "credit: turn"):
        blocks = re.findall(r"```python\n(.*?)```", sections()[preset], re.DOTALL)
        lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
        lines = [line.rpartition(" = ") for line in lines if " = " in line]
        assert len(lines) >= 3, preset
        for expression, _, number in lines:
            value = eval(expression, {"__builtins__": {}}, names)  # our own page
            assert value == near(number.strip()), f"{preset}: {expression}"


def test_the_page_names_every_preset_and_every_key_it_sets() -> None:
    for preset, values in PRESETS.items():
        for key in values:
            assert f"`{key}`" in sections()[preset] or f"{key}:" in sections()[preset], (
                preset,
                key,
            )
