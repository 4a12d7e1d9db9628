"""Turns of episodes whose history is rewritten, as one tree and as rows of their own.

    .venv/bin/python benchmarks/episodes_tree.py [--episodes 1] [--repeats 2] [--layers 30]

A model of SmolLM2-135M's shape with random weights trains a group of episodes of eight turns, once
as trees and once with a row for every turn's whole sequence (what `Packer(share_prompts=False)`
plans), with the same budget of tokens for a micro-batch. A pass is forward and backward over all
rows, without optimizer. Gradients are compared in float32, times are of bfloat16.

- thinking dropped: a turn samples thinking and an answer; the next prompt has the answer without
  the thinking, and a message of the environment.
- rewritten tail: the environment replaces the last tokens of the history, from the middle of what
  was sampled, by a summary and a message.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quickstart import ROOT, save

TURNS = 8
PROMPT = 512
THINKING, ANSWER, MESSAGE = 96, 32, 64
# Of the rewritten tail: tokens of the history that go, and those that come in their place.
TAIL, SUMMARY = 48, 16
CASES = ("thinking dropped", "rewritten tail")
VOCABULARY = 49_152


def shapes(case: str) -> tuple[Any, ...]:
    """The turns of one episode."""
    from cohort.actors.records import TurnShape

    sampled = THINKING + ANSWER
    turns = [TurnShape(None, PROMPT, 0, sampled)]
    for index in range(TURNS - 1):
        if case == "thinking dropped":
            kept, inserted = turns[-1].end - sampled, ANSWER + MESSAGE
        else:
            kept, inserted = turns[-1].end - TAIL, SUMMARY + MESSAGE
        turns.append(TurnShape(index, kept, inserted, sampled))
    return tuple(turns)


def episodes(case: str, count: int) -> tuple[Any, Any]:
    """A group of random episodes with these turns: (what the driver knows, the tokens)."""
    import numpy as np

    from cohort.actors.records import Completion, Group, GroupMeta, Prompt, ScoredGroup, Turn

    random = np.random.default_rng(0)
    turns = shapes(case)
    tokens = sum(turn.sampled for turn in turns)
    completions = tuple(
        Completion(
            id=f"g/{i}",
            prompt_id="p",
            token_ids=random.integers(0, VOCABULARY, tokens),
            logprobs=np.full(tokens, -10.0, dtype=np.float32),
            finish_reason="stop",
            seed=i,
            weight_versions=(0, 0),
            text="",
            turns=tuple(
                Turn(turn, random.integers(0, VOCABULARY, turn.inserted), (0, 0), "stop")
                for turn in turns
            ),
        )
        for i in range(count)
    )
    prompt = Prompt("p", tuple(int(t) for t in random.integers(0, VOCABULARY, PROMPT)), "")
    meta = GroupMeta(
        group_id="g",
        prompt_tokens=PROMPT,
        completion_ids=tuple(completion.id for completion in completions),
        completion_tokens=(tokens,) * count,
        truncated=(False,) * count,
        weight_versions=(0, 0),
        actor="a",
        seconds=0.0,
        turns=(turns,) * count,
    )
    return meta, ScoredGroup(Group("g", prompt, completions), {}, (0.0,) * count)


def random_model(layers: int) -> Any:
    """SmolLM2-135M's shape, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_theta=100_000.0,
            tie_word_embeddings=True,
        )
    )


def planned(meta: Any, shared: bool, budget: int) -> list[Any]:
    """The micro-batches of one rank."""
    from cohort.learner.packing import Packer, RowCost
    from cohort.learner.plan import score_batches

    packer = Packer(
        ranks=1,
        micro_batch_tokens=budget,
        cost=RowCost(masked=False),
        share_prompts=shared,
        whole_completions=False,
    )
    [batches] = score_batches([meta], packer)
    return list(batches)


def one_pass(policy: Any, batches: list[Any], group: Any) -> tuple[float, dict[str, float]]:
    """(seconds of forward and backward over all micro-batches, each completion's log-prob sum).

    The loss is the mean over all sampled tokens; gradients are left in the model.
    """
    from cohort.learner.batch import build_micro_batch

    policy.zero_grad(set_to_none=False)
    total = sum(len(completion.token_ids) for completion in group.group.completions)
    sums: dict[str, float] = {}
    began = time.monotonic()
    for batch in batches:
        tensors = build_micro_batch(batch, {"g": group})
        logprobs_T, _ = policy(tensors, 1.0, batch.chunks)
        (-logprobs_T.sum() / total).backward()
        parts = logprobs_T.detach().split([segment.tokens for segment in batch.segments])
        for segment, part in zip(batch.segments, parts, strict=True):
            name = segment.completion_id
            sums[name] = sums.get(name, 0.0) + float(part.double().sum())
    return time.monotonic() - began, sums


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both layouts in turns, after a comparison of their gradients."""
    import torch

    from cohort.learner.logprobs import PolicyModel

    meta, group = episodes(case, options.episodes)
    plans = {
        name: planned(meta, name == "tree", options.micro_batch_tokens) for name in ("tree", "rows")
    }
    model = random_model(options.layers)
    policy = PolicyModel(model, "tree")
    gradients, sums, float32_s = {}, {}, {}
    for name, batches in plans.items():
        float32_s[name], sums[name] = one_pass(policy, batches, group)
        gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters()}
    pairs = [(gradients["tree"][n], gradients["rows"][n]) for n in gradients["tree"]]
    norm = torch.stack([rows.norm() for _, rows in pairs]).norm()
    difference = max(float((tree - rows).norm() / norm) for tree, rows in pairs)
    largest = max(float((tree - rows).abs().max()) for tree, rows in pairs)
    model.bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(options.repeats + 1):
        for name, batches in plans.items():
            seconds[name].append(one_pass(policy, batches, group)[0])
    return {
        "case": case,
        "layers": options.layers,
        "turns": [list(vars(turn).values()) for turn in shapes(case)],
        "sampled_tokens": sum(meta.completion_tokens),
        "tokens": {n: sum(r.length for b in plans[n] for r in b.rows) for n in plans},
        "padded_tokens": {n: sum(b.padded_tokens for b in plans[n]) for n in plans},
        "micro_batches": {n: len(plans[n]) for n in plans},
        "gradient_difference_over_norm": difference,
        "gradient_difference_largest": largest,
        "gradient_norm": float(norm),
        "logprob_sums": sums,
        "float32_seconds": float32_s,
        "seconds": {n: values[1:] for n, values in seconds.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line a case."""
    lines = [
        "| history | layers | sampled | tokens: tree | rows | fewer | s, tree: median (range) "
        "| s, rows | faster | gradient difference / norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        tree, rows = r["tokens"]["tree"], r["tokens"]["rows"]
        difference = r["gradient_difference_over_norm"]
        middle = {n: statistics.median(r["seconds"][n]) for n in r["seconds"]}
        timed = [
            f"{middle[n]:.2f} ({min(r['seconds'][n]):.2f}-{max(r['seconds'][n]):.2f})"
            for n in ("tree", "rows")
        ]
        lines.append(
            f"| {r['case']} | {r['layers']} | {r['sampled_tokens']} | {tree} | {rows} "
            f"| {rows / tree:.2f} x | {timed[0]} | {timed[1]} "
            f"| {middle['rows'] / middle['tree']:.2f} x | {difference:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--micro-batch-tokens", type=int, default=2304)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-episodes-tree")
    options = parser.parse_args()
    if "COHORT_BENCHMARK" not in os.environ:
        from cohort.cluster.placement import cpu_environment

        # Heap and OpenMP settings are read when a process starts.
        environment = {**os.environ, **cpu_environment(options.threads), "COHORT_BENCHMARK": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    import torch

    torch.set_num_threads(options.threads)
    given = {name: value for name, value in vars(options).items() if name != "out"}
    results: list[dict[str, Any]] = []
    for case in options.cases:
        results.append(measure(case, options))
        save(options.out, table(results), options=given, results=results)


if __name__ == "__main__":
    main()
