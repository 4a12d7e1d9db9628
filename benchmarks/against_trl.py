"""Cohort beside TRL's GRPOTrainer on this machine: the same loss, and the time of one step.

    .venv/bin/python benchmarks/against_trl.py loss
    .venv/bin/python benchmarks/against_trl.py step [--rounds 2] [--steps 3] [--regimes a b]

The first use makes an environment for TRL under ~/.cache/cohort/benchmarks (torch, transformers and
accelerate in our versions, no vllm: TRL imports it wherever it is found). `step` alternates between
the sides, every run in processes of its own; `variants` finds TRL's fastest precision first. Both
write their raw numbers to --out and print a table. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from quickstart import COHORT, ROOT, machine

HOME = Path.home() / ".cache" / "cohort" / "benchmarks"
MODEL = Path.home() / ".cache" / "cohort" / "models" / "SmolLM2-135M-Instruct"
ENVIRONMENT = HOME / "trl-env"
VERSIONS = ("1.9.2", "1.16.0")
SHARED = ("torch", "transformers", "accelerate")
PROMPTS, GROUP = 4, 8
REGIMES = {"a": (32, 128), "b": (512, 64)}
LOSSES = {"dapo": "dapo", "grpo": "grpo_paper", "dr_grpo": "dr_grpo"}


def make_environment() -> None:
    """Install what is missing."""
    from importlib.metadata import version

    python = ENVIRONMENT / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        # torch first and alone: nothing may ask for its CUDA build.
        subprocess.run([*pip, f"torch=={version('torch').split('+')[0]}"], check=True)
        pins = [f"{name}=={version(name).split('+')[0]}" for name in SHARED]
        subprocess.run([*pip, *pins, "datasets", "requests"], check=True)
    for trl in VERSIONS:
        target = HOME / f"trl-{trl}"
        if not target.exists():
            subprocess.run([*pip, "--no-deps", "--target", str(target), f"trl=={trl}"], check=True)


def run_trl(version: str, what: str, source: Path, target: Path, log: Path) -> None:
    """Run trl_side.py under one version of TRL, on both cores."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HOME / f"trl-{version}"),
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [str(ENVIRONMENT / "bin" / "python"), str(Path(__file__).with_name("trl_side.py"))]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*command, what, str(source), str(target)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"TRL {version} failed; see {log}")


# The same loss -----------------------------------------------------------------------------------


def compare_losses(out: Path) -> str:
    """Loss and gradients of the same completions: ours packed, TRL's padded."""
    import torch
    from transformers import AutoModelForCausalLM

    from cohort.learner.batch import build_micro_batch
    from cohort.learner.config import AlgorithmConfig
    from cohort.learner.grpo import policy_loss
    from cohort.learner.logprobs import PolicyModel
    from cohort.learner.packing import Packer
    from cohort.learner.plan import plan_step

    groups, inputs = make_samples()
    given = {
        "model": str(MODEL),
        "inputs": inputs,
        "loss_types": list(LOSSES),
        "group_size": GROUP,
        "max_tokens": 24,
    }
    torch.save(given, out / "tensors.pt")
    lines = [
        "| TRL | loss_type | our preset | TRL's loss | ours | difference "
        "| largest gradient difference / norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for version in VERSIONS:
        run_trl(version, "loss", out / "tensors.pt", out / f"trl-{version}.pt", out / "trl.log")
        theirs = torch.load(out / f"trl-{version}.pt")
        for loss_type, preset in LOSSES.items():
            # What TRL does not do is switched off, by keys of the config.
            algorithm = AlgorithmConfig(
                preset=preset, correction="off", dual_clip=None, kl_coef=0.0, clip_high=0.28,
                overlong_buffer=0.0, drop_zero_variance=False,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            policy = PolicyModel(model)
            old = dict(zip((id for g in groups for id in g.ids), inputs["old_rows"], strict=True))
            plan = plan_step(
                [(g.meta, g.scores) for g in groups], algorithm, Packer(1, 300), max_tokens=24
            )
            total = 0.0
            advantages = {}
            for batch in plan.updates[0][0]:
                tensors = build_micro_batch(batch, {g.meta.group_id: g.scored for g in groups})
                advantages.update({s.completion_id: s.advantage for s in batch.segments})
                logprobs, _ = policy(tensors, 1.0, batch.chunks)
                old_T = torch.cat([old[segment.completion_id] for segment in batch.segments])
                loss, _ = policy_loss(tensors.loss_inputs(logprobs, old_T=old_T), algorithm)
                loss.backward()
                total += float(loss.detach())
            their = theirs[loss_type]
            gradients = {n: p.grad for n, p in model.named_parameters()}
            norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
            gap = max(
                float((gradients[name] - gradient).norm()) / norm
                for name, gradient in their["gradients"].items()
            )
            lines.append(
                f"| {version} | {loss_type} | {preset} | {their['loss']:.7f} | {total:.7f} "
                f"| {abs(total - their['loss']):.1e} | {gap:.1e} |"
            )
    return "\n".join(lines) + "\n"


class Sample:
    """One group in our form."""

    def __init__(self, name: str, prompt: list[int], rows: list[Any], rewards: list[float]) -> None:
        import numpy as np

        from cohort.actors.records import (
            Completion,
            Group,
            GroupMeta,
            Prompt,
            ScoredGroup,
            ScoreMeta,
        )

        self.ids = [f"{name}/{i}" for i in range(len(rows))]
        completions = tuple(
            Completion(id, name, ids, np.zeros(len(ids), dtype=np.float32), "stop", 0, (0, 0), "")
            for id, ids in zip(self.ids, rows, strict=True)
        )
        self.scored = ScoredGroup(
            Group(name, Prompt(name, tuple(prompt), ""), completions), {}, tuple(rewards)
        )
        lengths = tuple(len(ids) for ids in rows)
        self.meta = GroupMeta(
            name, len(prompt), tuple(self.ids), lengths, (False,) * len(rows), (0, 0), "", 0.0
        )
        self.scores = ScoreMeta(name, tuple(rewards), {}, (), 0.0)


def make_samples() -> tuple[list[Sample], dict[str, Any]]:
    """Two groups of eight completions of 1-24 random tokens; the same in TRL's padded form.

    The old log-probs differ from the model's by up to 0.5, so that both clip bounds are met.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from cohort.learner.advantages import advantages

    random_ = np.random.default_rng(0)
    groups, prompts, rows = [], [], []
    values: dict[str, list[Any]] = {loss_type: [] for loss_type in LOSSES}
    for name, prompt_tokens in (("x", 20), ("y", 9)):
        prompt = [int(t) for t in random_.integers(100, 40_000, prompt_tokens)]
        ids = [random_.integers(100, 40_000, int(n)) for n in random_.integers(1, 25, GROUP)]
        rewards = [float(r) for r in random_.integers(0, 4, GROUP)]
        groups.append(Sample(name, prompt, ids, rewards))
        prompts += [prompt] * GROUP
        rows += ids
        # TRL takes advantages ready-made; Dr. GRPO does not divide them.
        for loss_type in LOSSES:
            scale: Any = "none" if loss_type == "dr_grpo" else "group"
            values[loss_type] += advantages(rewards, "mean", scale)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    old_rows = []
    for prompt, ids in zip(prompts, rows, strict=True):
        sequence = torch.tensor([*prompt, *ids.tolist()])
        with torch.no_grad():
            logprobs = model(sequence[None]).logits[0].log_softmax(-1)
        chosen = logprobs[len(prompt) - 1 : -1].gather(1, sequence[len(prompt) :, None])[:, 0]
        old_rows.append(chosen + torch.from_numpy(random_.uniform(-0.5, 0.5, len(ids))).float())
    # TRL pads prompts on the left, completions on the right.
    longest = max(map(len, prompts)), max(map(len, rows))

    def left(items: list[list[int]], width: int) -> torch.Tensor:
        return torch.tensor([[0] * (width - len(item)) + list(item) for item in items])

    def right(items: list[Any], width: int) -> torch.Tensor:
        return torch.tensor([[*list(item), *[0] * (width - len(item))] for item in items])

    return groups, {
        "prompt_ids": left(prompts, longest[0]),
        "prompt_mask": left([[1] * len(p) for p in prompts], longest[0]),
        "completion_ids": right([ids.tolist() for ids in rows], longest[1]),
        "completion_mask": right([[1] * len(ids) for ids in rows], longest[1]),
        "advantages": {name: torch.tensor(of_type) for name, of_type in values.items()},
        "old_per_token_logps": right([row.tolist() for row in old_rows], longest[1]),
        "num_items_in_batch": torch.tensor(sum(map(len, rows))),
        "old_rows": old_rows,
    }


# The time of a step ------------------------------------------------------------------------------


def make_prompts(tokens: int) -> list[str]:
    """Plain words, exactly this many tokens for both sides."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    words = [
        text
        for i in range(1000, 12_000)
        if re.fullmatch(r" [a-z]{3,9}", text := tokenizer.decode([i]))
    ]
    random_ = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < PROMPTS:
        text = "".join(random_.choices(words, k=tokens)).strip()
        if len(tokenizer(text)["input_ids"]) == tokens:
            prompts.append(text)
    return prompts


def endless_model(out: Path) -> Path:
    """The model under an end token that it never samples, so that every completion is complete.

    TRL forbids the end token instead (min_new_tokens).
    """
    folder = out / "model"
    if folder.exists():
        return folder
    shutil.copytree(MODEL, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        values = json.loads(file.read_text(encoding="utf-8"))
        values["eos_token" if name == "tokenizer_config.json" else "eos_token_id"] = (
            "<empty_output>" if name == "tokenizer_config.json" else 16
        )
        file.write_text(json.dumps(values), encoding="utf-8")
    return folder


REWARD = """
def variety(completions, **_):
    return [float(len(set(text))) for text in completions]
"""


def our_steps(regime: str, prompts: list[str], steps: int, out: Path, name: str) -> dict[str, Any]:
    """`cohort train` as a user runs it; seconds of each step from its metrics."""
    _, length = REGIMES[regime]
    model = endless_model(out)
    (out / "reward.py").write_text(REWARD, encoding="utf-8")
    data = out / f"prompts-{regime}.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in prompts), encoding="utf-8"
    )
    # All prompts are for training; what is held out is not used here.
    held_out = out / "held-out.jsonl"
    held_out.write_text(json.dumps({"prompt": "not used"}) + "\n", encoding="utf-8")
    run = out / name
    shutil.rmtree(run, ignore_errors=True)
    overrides = {
        "run.dir": run,
        "run.steps": steps,
        "run.checkpoint_every": 0,
        "model.path": model,
        "task.name": "dataset",
        "task.data": data,
        "task.eval_data": held_out,
        "task.prompts_per_step": PROMPTS,
        "task.group_size": GROUP,
        "rewards.functions": f"[{out / 'reward.py'}:variety]",
        "actors.max_tokens": length,
        "actors.compile": "true",
        "learner.learning_rate": 1e-6,
        # Two groups at a time: as fast as all four, with less memory to touch for the first time.
        "learner.micro_batch_tokens": 2112,
        "learner.logit_chunk_tokens": 4096,
        "algorithm.drop_zero_variance": "false",
        "tracking.wandb": "disabled",
    }
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(COHORT), "train", str(ROOT / "deploy" / "configs" / "addition.yaml"),
             *(f"{key}={value}" for key, value in overrides.items())],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"cohort failed; see {log}")
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    peak = re.search(
        r"peak memory: engines ([\d.]+) GiB, learner ([\d.]+) GiB", log.read_text(encoding="utf-8")
    )
    assert peak, f"{log} lacks the peak memory"
    return {
        "step_s": [row["time/step"] for row in rows],
        "generate_s": [row["time/generate"] for row in rows],
        "train_s": [row["time/train"] for row in rows],
        "sync_s": [row["time/sync"] for row in rows],
        "mean_length": [row["rollout/completion_tokens"] for row in rows],
        "trained": [row["samples/trained"] for row in rows],
        "reward": [row["reward/mean"] for row in rows],
        "peak_rss_gib": sum(map(float, peak.groups())),
    }


def trl_steps(
    version: str, variant: str, regime: str, prompts: list[str], steps: int, out: Path, name: str
) -> dict[str, Any]:
    """One run of TRL."""
    settings = {
        "model": str(MODEL),
        "variant": variant,
        "prompts": prompts,
        "group_size": GROUP,
        "completion_tokens": REGIMES[regime][1],
        "steps": steps,
    }
    source, target = out / f"{name}.settings.json", out / f"{name}.json"
    source.write_text(json.dumps(settings), encoding="utf-8")
    run_trl(version, "step", source, target, out / f"{name}.log")
    return json.loads(target.read_text(encoding="utf-8"))


def measure_steps(options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Alternating runs; the first steps of each warm up. Done runs are kept in steps.json."""
    file = out / "steps.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
    known = {(r["regime"], r["side"], r["round"]) for r in results}
    steps = options.warmup + options.steps
    for regime in options.regimes:
        prompts = make_prompts(REGIMES[regime][0])
        for round_ in range(options.rounds):
            for side in options.sides:
                if (regime, side, round_) in known:
                    continue
                name = f"{regime}-{round_}-{side}"
                print(f"{name} ...", flush=True)
                if side == "cohort":
                    found = our_steps(regime, prompts, steps, out, name)
                else:
                    found = trl_steps(side, options.variant, regime, prompts, steps, out, name)
                length = REGIMES[regime][1]
                assert set(found["mean_length"]) == {float(length)}, (name, found["mean_length"])
                print(f"  {[round(s, 1) for s in found['step_s']]}", flush=True)
                results.append(
                    {
                        "regime": regime,
                        "side": side,
                        "round": round_,
                        "warmup": options.warmup,
                        **found,
                    }
                )
                raw = {"machine": machine(), "variant": options.variant, "results": results}
                file.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return results


def step_table(results: list[dict[str, Any]]) -> str:
    """Medians, ranges and ratios per regime."""
    lines = [
        "| regime | side | step, s: median (range) | of it generation | n | peak memory, GiB "
        "| times as long as ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for regime in dict.fromkeys(result["regime"] for result in results):
        ours = 0.0
        for side in dict.fromkeys(result["side"] for result in results):
            runs = [r for r in results if (r["regime"], r["side"]) == (regime, side)]
            seconds = [s for run in runs for s in run["step_s"][run["warmup"] :]]
            generation = [s for run in runs for s in run["generate_s"][run["warmup"] :]]
            middle = statistics.median(seconds)
            ours = ours or middle
            label = "cohort" if side == "cohort" else f"TRL {side}"
            lines.append(
                f"| {regime} | {label} | {middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f}) "
                f"| {statistics.median(generation):.1f} | {len(seconds)} "
                f"| {max(run['peak_rss_gib'] for run in runs):.1f} | {middle / ours:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loss", "variants", "step"])
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a run left out")
    parser.add_argument("--sides", nargs="+", default=["cohort", *VERSIONS])
    parser.add_argument("--variant", default="bfloat16", help="TRL's precision")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-trl")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_environment()
    if options.what == "loss":
        text = compare_losses(out)
    elif options.what == "variants":
        prompts = make_prompts(REGIMES["a"][0])
        found = {
            (version, variant): trl_steps(
                version, variant, "a", prompts, options.steps + 1, out, f"{version}-{variant}"
            )
            for version in options.sides
            if version != "cohort"
            for variant in ("float32", "bfloat16", "autocast")
        }
        raw = [{"side": side, "variant": name, **run} for (side, name), run in found.items()]
        (out / "variants.json").write_text(
            json.dumps({"machine": machine(), "results": raw}), encoding="utf-8"
        )
        text = "".join(
            f"TRL {version} {variant}: {[round(s, 1) for s in run['step_s']]}\n"
            for (version, variant), run in found.items()
        )
    else:
        text = step_table(measure_steps(options, out))
    (out / f"{options.what}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
