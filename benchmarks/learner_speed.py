"""The learner's forward and backward pass against this machine's own matrix products.

    .venv/bin/python benchmarks/learner_speed.py [--threads 2] [--repeats 5] [--model PATH]
    .venv/bin/python benchmarks/learner_speed.py --device cuda --shape 1.5b [--float8 tensorwise]

Neither optimizer nor ZeRO: a whole step is what learner_step.py measures.

Peak: the median rate of a bfloat16 product of 4096 x 4096, measured in between. FLOPs of a pass are
those that the mathematics needs: 6 per parameter of the layers and token, 6 per parameter of the
output layer and completion token, and 12 * layers * heads * head_dim per pair of tokens of which
one attends to the other. Recomputed logits and hidden attention scores count as nothing.
Start it through `env` with what `cohort.cluster.placement.cpu_environment` says, as the learner
is; the script does that itself on CPUs.
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

MODEL = Path.home() / ".cache" / "cohort" / "models" / "SmolLM2-135M-Instruct"
# name: prompt tokens, completions, tokens of each, rows.
ROWS = {
    "1 x (512 + 8 x 192)": (512, 8, 192, 1),
    "1 x (1536 + 8 x 64)": (1536, 8, 64, 1),
    "1 x (0 shared) 2048": (1, 1, 2047, 1),
    "2 x (32 + 8 x 128)": (32, 8, 128, 2),
    "8 x (46 + 8 x 13)": (46, 8, 13, 8),
}
FLOAT8 = ("off", "tensorwise", "rowwise")
# Random models of the sizes of Qwen2.5, and a tiny one to try the scripts.
SHAPES = {
    "0.5b": dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "1.5b": dict(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7b": dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_model(shape: str, device: str, layers: int | None = None) -> Any:
    """A bfloat16 model of this shape with random weights; layers: fewer or more than it has."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(**settings)).bfloat16()


def build(options: argparse.Namespace) -> Any:
    """The policy as the learner holds it."""
    import torch
    from transformers import AutoModelForCausalLM

    from cohort.learner.logprobs import PolicyModel
    from cohort.learner.self_check import self_check

    if options.shape:
        model = random_model(options.shape, options.device)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model = model.to(options.device)
    policy = PolicyModel(model, options.attention)
    self_check(policy, 1.0)
    if options.float8 != "off":
        from cohort.learner.float8 import convert

        convert(model, options.float8, torch.device(options.device))
    return policy


def measure_peak(device: str) -> float:
    """GFLOP/s of one large product."""
    import torch

    n = 4096 if device == "cpu" else 16384
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronize(device)
        began = time.monotonic()
        a @ b
        synchronize(device)
        seconds.append(time.monotonic() - began)
    return 2 * n**3 / statistics.median(seconds) / 1e9


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def inputs_of(shape: tuple[int, int, int, int], vocabulary: int, device: str) -> Any:
    """A planned micro-batch of random tokens."""
    import torch

    from cohort.learner.attention import Tree
    from cohort.learner.logprobs import ModelInputs
    from cohort.learner.shapes import RowShape

    prompt, count, size, rows = shape
    length = prompt + count * size
    position = torch.cat([torch.arange(prompt), *[torch.arange(prompt, prompt + size)] * count])
    before = [prompt - 1, *range(prompt, prompt + size - 1)]
    predict = torch.tensor(
        [
            row * length + (place if place < prompt else place + size * i)
            for row in range(rows)
            for i in range(count)
            for place in before
        ]
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows * length,), generator=generator)
    target = torch.randint(0, vocabulary, (len(predict),), generator=generator)
    return ModelInputs(
        ids.to(device),
        position.repeat(rows).to(device),
        Tree((RowShape(prompt, (size,) * count),) * rows),
        predict.to(device),
        target.to(device),
    )


def flops(shape: tuple[int, int, int, int], config: Any, parameters: int) -> float:
    """Of one forward and backward pass, as the module's text counts them.

    config: the model's; parameters: of the whole model.
    """
    prompt, count, size, rows = shape
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    layers = parameters - embeddings
    tokens = prompt + count * size
    pairs = prompt * (prompt + 1) / 2 + count * (size * prompt + size * (size + 1) / 2)
    width = config.num_attention_heads * (
        config.head_dim
        if getattr(config, "head_dim", None)
        else config.hidden_size // config.num_attention_heads
    )
    attention = 12 * config.num_hidden_layers * width * pairs
    return rows * (6 * layers * tokens + 6 * head * count * size + attention)


def measure(policy: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of every repeat, in turns with the peak."""
    import torch

    parameters = sum(p.numel() for p in policy.model.parameters())
    results = []
    for name, shape in ROWS.items():
        inputs = inputs_of(shape, policy.model.config.vocab_size, options.device)
        seconds, peaks = [], []
        for _ in range(options.repeats + 1):
            peaks.append(measure_peak(options.device))
            policy.zero_grad(set_to_none=False)
            synchronize(options.device)
            began = time.monotonic()
            logprobs, _ = policy(inputs, 1.0, 1)
            logprobs.sum().backward()
            synchronize(options.device)
            seconds.append(time.monotonic() - began)
        work = flops(shape, policy.model.config, parameters) / 1e9
        rate = work / statistics.median(seconds[1:])
        peak = statistics.median(peaks[1:])
        result = {
            "rows": name, "gflop": work, "seconds": seconds[1:], "gflops": rate,
            "peak_gflops": peaks[1:], "share": rate / peak,
            "row_tokens": len(inputs.input_ids_N), "completion_tokens": len(inputs.predict_T),
            "tokens_per_s": len(inputs.input_ids_N) / statistics.median(seconds[1:]),
        }  # fmt: skip
        if options.device == "cuda":
            result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {result['share']:.0%} of {peak:.0f} GFLOP/s", flush=True)
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One line a row shape."""
    lines = [
        "| rows | tokens | of completions | GFLOP | s: median (range) | GFLOP/s | peak | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        seconds = r["seconds"]
        lines.append(
            f"| {r['rows']} | {r['row_tokens']} | {r['completion_tokens']} | {r['gflop']:.0f} "
            f"| {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {r['gflops']:.0f} | {statistics.median(r['peak_gflops']):.0f} | {r['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def parser_for(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """What every benchmark of the learner can be told: the model, and where and how it runs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--shape", choices=list(SHAPES), help="a random model of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    attentions = ["auto", "tree", "flex", "sdpa", "eager"]
    parser.add_argument("--attention", choices=attentions, default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def main() -> None:
    parser = parser_for(__doc__, repeats=5)
    parser.add_argument("--float8", choices=FLOAT8, default="off")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-learner")
    options = parser.parse_args()
    if options.device == "cpu" and "COHORT_BENCHMARK" not in os.environ:
        from cohort.cluster.placement import cpu_environment

        # Heap and OpenMP settings are read when a process starts.
        environment = {**os.environ, **cpu_environment(options.threads), "COHORT_BENCHMARK": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    import torch

    torch.set_num_threads(options.threads)
    results = measure(build(options), options)
    save(
        options.out,
        table(results),
        attention=options.attention,
        float8=options.float8,
        results=results,
    )


if __name__ == "__main__":
    main()
