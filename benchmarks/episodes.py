"""Episodes, measured: does a model learn a game of several turns?

    .venv/bin/python benchmarks/episodes.py [--seeds 0 1 2] [--steps 40] [--out FOLDER]

For every seed: examples/guess_number.py with SmolLM2-135M-Instruct, then `cohort eval` of the
untouched and of the trained model on the held-out games (each number from 1 to 9 about seven times;
one greedy episode and 8 sampled ones each). Writes FOLDER/results.json (raw numbers) and
FOLDER/results.md (tables). What is already there is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quickstart import ROOT, cohort, evaluation, rewards_by_tens, save

MODEL = Path("~/.cache/cohort/models/SmolLM2-135M-Instruct").expanduser()


def measure(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train with one seed, evaluate before and after."""
    folder = options.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run, metrics = folder / "run", folder / "run" / "metrics.jsonl"
    if not metrics.exists():
        keys = [f"run.dir={run}", f"run.seed={seed}", f"run.steps={options.steps}"]
        with (folder / "train.log").open("wb") as log:
            subprocess.run(
                [sys.executable, "examples/guess_number.py", *keys],
                cwd=ROOT, stdout=log, stderr=log, check=True,
            )  # fmt: skip
    found: dict[str, Any] = {"seed": seed}
    for name, model in (("before", ["--model", MODEL]), ("after", [])):
        file = folder / f"{name}.json"
        if not file.exists():
            cohort("eval", run, "-o", file, *model, log=folder / f"{name}.log")
        found[name] = evaluation(file, "untouched" if name == "before" else f"seed-{seed}")
    found["metrics"] = [
        json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()
    ]
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Held-out games, then the curve."""
    lines = [
        "| seed | won, greedy | won, sampled | won in one of 8 | reward, greedy "
        "| reward, sampled | replies of a sampled episode |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        pairs = [
            [figure(result["before"]), figure(result["after"])]
            for figure in (
                lambda e: e["greedy_solved"],
                lambda e: e["pass_at"]["1"],
                lambda e: e["pass_at"]["8"],
                lambda e: e["greedy_reward"],
                lambda e: e["sampled_reward"],
                lambda e: e["task_sampled"]["episodes/turns"],
            )
        ]
        cells = [f"{before:.2f} → {after:.2f}" for before, after in pairs]
        lines.append(f"| {result['seed']} | " + " | ".join(cells) + " |")
    lines += rewards_by_tens(results, "Mean reward of an episode in training", digits=2)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-episodes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        print(f"seed {seed} ...", flush=True)
        results.append(measure(seed, options))
    save(options.out, table(results), steps=options.steps, results=results)


if __name__ == "__main__":
    main()
