"""Memory of scoring completion tokens: in chunks as the learner does it, and all logits at once.

    .venv/bin/python benchmarks/logit_memory.py [--out FOLDER]

Every row is a process of its own: a one-layer model with a large vocabulary, one forward and
backward pass over N completion tokens, and how far the process's resident memory rose above what
the model and its gradients take. Takes about four minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from quickstart import ROOT, save

VOCABULARIES = (49_152, 151_936)
TOKENS = (1024, 4096, 8192)
WAYS = ("chunks of 256", "chunks of 1024", "all at once")


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(vocabulary: int, tokens: int, way: str) -> dict[str, Any]:
    """Score and differentiate; the rise of the peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cohort.learner.attention import Tree
    from cohort.learner.logprobs import ModelInputs, PolicyModel
    from cohort.learner.shapes import RowShape

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    policy = PolicyModel(model)
    length = 256
    rows = tokens // length
    ids = torch.randint(0, vocabulary, (rows, length + 1))
    position = torch.arange(length + 1).repeat(rows, 1)
    predict = torch.cat([torch.arange(length) + row * (length + 1) for row in range(rows)])
    target = ids[:, 1:].flatten()

    def run(n: int) -> None:
        rows_, tokens_ = n // length, n
        tree = Tree((RowShape(1, (length,)),) * rows_)
        inputs = ModelInputs(
            ids[:rows_].flatten(), position[:rows_].flatten(), tree, predict[:tokens_],
            target[:tokens_],
        )  # fmt: skip
        if way == "all at once":
            logprobs = model.lm_head(policy.hidden(inputs)).float().log_softmax(-1)
            scores = logprobs.gather(1, inputs.target_T[:, None])
        else:
            chunks = -(-tokens_ // int(way.split()[-1]))
            scores, _ = policy(inputs, 1.0, chunks)
        scores.sum().backward()

    # What the model, its gradients and the libraries need is there after one row.
    run(length)
    before = peak()
    run(tokens)
    return {
        "vocabulary": vocabulary, "tokens": tokens, "way": way, "rise_mib": peak() - before
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """One line a vocabulary and length."""
    lines = [
        "| vocabulary | completion tokens | " + " | ".join(f"{way}, MiB" for way in WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            cells = [
                f"{result['rise_mib']:.0f}"
                for way in WAYS
                for result in results
                if (result["vocabulary"], result["tokens"], result["way"])
                == (vocabulary, tokens, way)
            ]
            lines.append(f"| {vocabulary:,} | {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-logits")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        vocabulary, tokens, way = options.child
        print(json.dumps(child(int(vocabulary), int(tokens), way)))
        return
    results = []
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            for way in WAYS:
                command = [sys.executable, __file__, "--child", str(vocabulary), str(tokens), way]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    save(options.out, table(results), results=results)


if __name__ == "__main__":
    main()
