"""A whole step of one learner rank: tokens a second, and memory against ZeRO's own accounting.

    .venv/bin/python benchmarks/learner_step.py [--stages 0 1 2 3] [--float8 off tensorwise]
    .venv/bin/python benchmarks/learner_step.py --device cuda --shape 1.5b \\
        --float8 off tensorwise rowwise --groups 16 --micro-batch-tokens 16384

Every pair of a ZeRO stage and a float8 recipe is a LearnerWorker in a process of its own: random
groups of eight completions, forward and backward in micro-batches, AdamW, the weights published.
Rates are those of learner_speed.py: FLOPs that the mathematics needs over the time of the whole
step, beside a bfloat16 product of the same device.

State is every tensor that is alive after the last step. The accounting of Rajbhandari et al. 2020
(arXiv 1910.02054, section 3.1) is 16 bytes a parameter on one rank at any stage: 2 of weights, 2 of
gradients, 12 of optimizer state. Peak: on a GPU of its allocator, on a CPU the process's resident
memory, libraries included. The device named in the table is the only one that was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from critic_memory import live_bytes, metas, sample_groups
from learner_speed import FLOAT8, flops, measure_peak, parser_for, random_model, synchronize
from quickstart import ROOT, save

GIB = 2**30


def measure(options: argparse.Namespace, stage: int, float8: str) -> dict[str, Any]:
    """Steps of one setting, in this process."""
    import torch
    from transformers import AutoConfig

    from cohort.learner.config import AlgorithmConfig, LearnerConfig
    from cohort.learner.packing import Packer, RowCost
    from cohort.learner.plan import plan_step
    from cohort.learner.spec import LearnerSpec
    from cohort.learner.worker import LearnerWorker

    model = AutoConfig.from_pretrained(options.model)
    groups = sample_groups(options.groups, options.prompt, options.completion, model.vocab_size)
    learner = LearnerConfig(
        zero_stage=stage,
        float8=float8,
        attention=options.attention,
        micro_batch_tokens=options.micro_batch_tokens,
        logit_chunk_tokens=options.logit_chunk_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    algorithm = AlgorithmConfig()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        spec = LearnerSpec(
            model_path=str(options.model), dtype="bfloat16", learner=learner, algorithm=algorithm,
            temperature=1.0, max_tokens=options.completion, rank=0, world_size=1,
            device=options.device, threads=options.threads, seed=0,
            shm_dir=str(Path(shm) / "weights"), total_steps=options.repeats + 1,
        )  # fmt: skip
        worker = LearnerWorker(spec)
        _, port = worker.rendezvous()
        facts = worker.setup("127.0.0.1", port, timeout_s=600)
        plan = plan_step(
            [metas(group) for group in groups],
            algorithm,
            Packer(
                1,
                options.micro_batch_tokens,
                options.logit_chunk_tokens,
                RowCost(facts.attention_work, facts.masked_attention, facts.length_multiple),
                facts.shares_prompts,
            ),
            max_tokens=options.completion,
        )
        seconds, publish, peaks = [], [], []
        for version in range(options.repeats + 1):
            synchronize(options.device)
            if options.device == "cuda":
                # What measures the peak rate takes memory of its own.
                torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            rank = worker.step([plan.updates[0][0]], groups)
            synchronize(options.device)
            seconds.append(time.monotonic() - began)
            assert rank.updates[0].applied, "a step was left out: its gradients were not finite"
            began = time.monotonic()
            worker.publish(version, [version - 1], remote=False)
            publish.append(time.monotonic() - began)
            memory = worker.memory()
            peaks.append(measure_peak(options.device))
    gc.collect()
    shape = (options.prompt, 8, options.completion, options.groups)
    rate = flops(shape, model, facts.parameters) / statistics.median(seconds[1:]) / 1e9
    return {
        "stage": stage, "float8": float8, "parameters": facts.parameters,
        "micro_batches": len(plan.updates[0][0]), "tokens": plan.row_tokens,
        "first_step_s": seconds[0], "step_s": seconds[1:], "publish_s": publish[1:],
        "gflops": rate, "peak_gflops": peaks[1:], "share": rate / statistics.median(peaks[1:]),
        "tokens_per_s": plan.row_tokens / statistics.median(seconds[1:]),
        "state_bytes": live_bytes(), "memory": memory,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """One line a setting."""
    lines = [
        "| device | ZeRO | float8 | step, s: median (range) | tokens/s | GFLOP/s | share of peak "
        "| publish, s | state, GiB (bytes a parameter) | 16 bytes a parameter | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        seconds, parameters = r["step_s"], r["parameters"]
        peak = r["memory"].get("peak_device_bytes", r["memory"]["peak_rss_bytes"])
        lines.append(
            f"| {r['device']} | {r['stage']} | {r['float8']} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f}-{max(seconds):.2f}) | {r['tokens_per_s']:.0f} "
            f"| {r['gflops']:.0f} | {r['share']:.0%} | {statistics.median(r['publish_s']):.2f} "
            f"| {r['state_bytes'] / GIB:.2f} ({r['state_bytes'] / parameters:.1f}) "
            f"| {16 * parameters / GIB:.2f} | {peak / GIB:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_for(__doc__, repeats=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--float8", nargs="+", choices=FLOAT8, default=["off"])
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--logit-chunk-tokens", type=int, default=1024)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-learner-step")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        [stage], [float8] = options.stages, options.float8
        options.one.write_text(json.dumps(measure(options, stage, float8)), encoding="utf-8")
        return
    environment = dict(os.environ)
    if options.device == "cpu":
        from cohort.cluster.placement import cpu_environment

        # Heap and OpenMP settings are read when a process starts.
        environment |= cpu_environment(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.shape:
            model = Path(scratch) / "model"
            random_model(options.shape, options.device).save_pretrained(model)
        for stage in options.stages:
            for float8 in options.float8:
                print(f"ZeRO {stage}, float8 {float8} ...", flush=True)
                found = Path(scratch) / "one.json"
                command = [
                    sys.executable, *sys.argv, "--one", found, "--model", model,
                    "--stages", stage, "--float8", float8,
                ]  # fmt: skip
                subprocess.run([str(part) for part in command], env=environment, check=True)
                results.append(json.loads(found.read_text(encoding="utf-8")))
    paths = ("model", "out", "one")
    settings = {key: value for key, value in vars(options).items() if key not in paths}
    settings["model"] = options.shape or options.model.name
    save(options.out, table(results), settings=settings, results=results)


if __name__ == "__main__":
    main()
