"""The travel planner, measured: warm-up, then GRPO over several seeds, on held-out queries.

    .venv/bin/python benchmarks/travel.py [--agency] [--level 1] [--seeds 0 1 2] [--steps 30]
        [--out FOLDER] [KEY=VALUE ...]

One `cohort warmup` of SmolLM2-135M-Instruct with deploy/configs/travel.yaml, or travel_agency.yaml,
where a trip is booked with tools over several turns; then for every seed
`cohort eval` of the warmed-up model, `cohort train` from it, `cohort eval` of the result. A seed
has queries of its own, for training and for evaluation. Writes FOLDER/results.json (raw numbers)
and FOLDER/results.md (tables). What is already there is not run again. Nothing else should run on
the machine. Keys of the config count for `cohort train`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from quickstart import ROOT, cohort, evaluation, rewards_by_tens, save

from cohort.rewards.travel.plan import Day, Plan, to_json
from cohort.rewards.travel.query import from_columns
from cohort.rewards.travel.scores import evaluate, travelplanner_metrics
from cohort.rewards.travel.solver import cheapest
from cohort.rewards.travel.task import TravelTask

CONFIGS = ROOT / "deploy" / "configs"


def warm_up(options: argparse.Namespace) -> dict[str, Any]:
    """The warmed-up model in FOLDER/warm; its losses."""
    model, log = options.out / "warm", options.out / "warm.log"
    if not model.exists():
        cohort(
            "warmup", options.config, model, "--steps", options.warmup_steps, "--batch-size", 16,
            "--learning-rate", 1e-4, "learner.lr_schedule=linear",
            "learner.micro_batch_tokens=2048", f"task.options={{level: {options.level}}}", log=log,
        )  # fmt: skip
    text = log.read_text(encoding="utf-8")
    return {
        "steps": options.warmup_steps,
        "losses": [float(loss) for loss in re.findall(r"loss ([\d.]+)  grad", text)],
        # Before and after, in nats a token.
        "held_out": [float(loss) for loss in re.findall(r"([\d.]+) -> ([\d.]+)", text)[0]],
    }


def measure(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, train, evaluate with one seed."""
    folder = options.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run, before, after = folder / "run", folder / "before.json", folder / "after.json"
    keys = [
        f"run.seed={seed}",
        f"task.options={{level: {options.level}}}",
        f"task.eval_prompts={options.eval_prompts}",
        f"model.path={options.out / 'warm'}",
    ]
    cohort("eval", options.config, "-o", before, *keys, log=folder / "before.log")
    if not (run / "metrics.jsonl").exists():
        cohort(
            "train", options.config, *keys, f"run.dir={run}", f"run.steps={options.steps}",
            f"learner.learning_rate={options.learning_rate}", "learner.micro_batch_tokens=2048",
            *options.keys, log=folder / "train.log",
        )  # fmt: skip
    cohort("eval", run, "-o", after, *keys[2:3], log=folder / "after.log")
    return {
        "seed": seed,
        "before": evaluation(before, "warm"),
        "after": evaluation(after, f"seed-{seed}"),
        "by_chance": by_chance(seed, options.level, options.eval_prompts),
        "metrics": [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ],
    }


def by_chance(seed: int, level: int, prompts: int, samples: int = 8) -> dict[str, float]:
    """TravelPlanner's metrics of plans that have the right days and cities, and hotels, meals and
    sights drawn from the tables: what reading the names without thinking would earn."""
    task = TravelTask(seed, level)
    found = []
    for index in range(prompts):
        query = from_columns(task.eval_row(index).columns["query"])
        solution = cheapest(query)
        assert solution is not None
        rng = random.Random(index)
        for _ in range(samples):
            days, left = [], {}
            for day in solution.plan.days:
                city = query.country.city(day.city)
                names = left.setdefault(city.name, [sight.name for sight in city.sights])
                sights = [names.pop(rng.randrange(len(names)))]
                while names and len(sights) < query.max_sights and rng.random() < 0.5:
                    sights.append(names.pop(rng.randrange(len(names))))
                hotel = rng.choice(city.hotels).name if day.hotel else None
                meals = tuple(rng.choice(city.restaurants).name for _ in day.meals)
                days.append(Day(day.city, meals, tuple(sights), hotel, day.travel))
            found.append(evaluate(query, to_json(Plan(tuple(days)))))
    return travelplanner_metrics(found)


def table(results: list[dict[str, Any]]) -> str:
    """Held-out results, then the curve; with tools also turns and what a tool refused."""
    more = [
        name
        for name in ("episodes/turns", "episodes/tool_errors")
        if name in results[0]["before"]["task_sampled"]
    ]
    lines = [
        "| seed | reward, greedy | pass@1 | pass@8 | final pass, greedy | sampled "
        "| by chance | hard rules (micro), sampled | commonsense (micro), sampled "
        "| delivery, sampled | reward, sampled |" + "".join(f" {name}, sampled |" for name in more),
        "|---" * (11 + len(more)) + "|",
    ]
    for result in results:
        old, new = result["before"], result["after"]
        pairs = [
            (old["greedy_reward"], new["greedy_reward"]),
            (old["pass_at"]["1"], new["pass_at"]["1"]),
            (old["pass_at"]["8"], new["pass_at"]["8"]),
            (old["task_greedy"]["final_pass_rate"], new["task_greedy"]["final_pass_rate"]),
            *(
                (old["task_sampled"][name], new["task_sampled"][name])
                for name in ("final_pass_rate", "hard_micro", "commonsense_micro", "delivery_rate")
            ),
            (old["sampled_reward"], new["sampled_reward"]),
            *((old["task_sampled"][name], new["task_sampled"][name]) for name in more),
        ]
        cells = [f"{before:.2f} → {after:.2f}" for before, after in pairs]
        cells.insert(5, f"{result['by_chance']['final_pass_rate']:.2f}")
        lines.append(f"| {result['seed']} | " + " | ".join(cells) + " |")
    lines += rewards_by_tens(results, "Mean reward of training", digits=3)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warmup-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--eval-prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-travel")
    parser.add_argument("--agency", action="store_true", help="with tools, over several turns")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of the config, for training")
    options = parser.parse_args()
    options.config = CONFIGS / ("travel_agency.yaml" if options.agency else "travel.yaml")
    options.out.mkdir(parents=True, exist_ok=True)
    warm = warm_up(options)
    results = []
    for seed in options.seeds:
        print(f"seed {seed} ...", flush=True)
        results.append(measure(seed, options))
        given = {**vars(options), "config": options.config.name}
        settings = {name: str(value) for name, value in given.items() if name != "out"}
        save(options.out, table(results), settings=settings, warm_up=warm, results=results)


if __name__ == "__main__":
    main()
