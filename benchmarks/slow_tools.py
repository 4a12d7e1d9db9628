"""Slow tools, measured: do engines wait for them, and what do waiting episodes cost?

    .venv/bin/python benchmarks/slow_tools.py [--steps 8] [--episodes 4000] [--out FOLDER]

1. On the real stack: 64 episodes of four turns at once, SmolLM2-135M-Instruct, with an environment
   that answers at once, and one that takes 0.1 to 2 s for each answer; `actors.max_staleness` 0 and
   1. Besides the tokens of a second, the share of the time in which the engine computes is measured
   (processor time of its process, of one core), and that in which it has nothing to do.
2. A simulated pool: thousands of episodes at once, whose turns are sampled by nobody (0.05 to 1 s),
   with one real worker of environments. How much longer do they take than they must, and how much
   memory does the worker need?

Writes FOLDER/results.json (raw numbers) and FOLDER/results.md (tables).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos import ENGINE
from quickstart import COHORT, CONFIG, ROOT, save

import cohort as api
from cohort.actors.engine import RawCompletion
from cohort.actors.play import Player
from cohort.actors.records import Prompt, Request, SamplingSpec
from cohort.rewards.config import EnvironmentsConfig, TaskConfig
from cohort.rewards.environments.specs import environment_spec
from cohort.rewards.environments.worker import EnvironmentWorker

MODEL = Path("~/.cache/cohort/models/SmolLM2-135M-Instruct").expanduser()
# Episodes of a step on the real stack, and the turns of each.
AT_ONCE = 64
TURNS = 4
TOOL_S = (0.1, 2.0)
SAMPLE_S = (0.05, 1.0)
MIB = 2**20


class Clerk:
    """Answers after a while; slow: whether it takes its time."""

    def __init__(self, slow: bool = True) -> None:
        self.slow = slow

    def reset(self, row: Mapping[str, Any], seed: int) -> None:  # noqa: ARG002
        self.waits = random.Random(seed)
        self.left = TURNS

    async def step(self, reply: api.Reply) -> api.Step:
        if self.slow:
            await asyncio.sleep(self.waits.uniform(*TOOL_S))
        self.left -= 1
        # Something to learn from: digits.
        earned = sum(c.isdigit() for c in reply.text) / max(1, len(reply.text))
        return api.Step("Go on.", reward=earned / TURNS, done=self.left == 0)


def real(slow: bool, staleness: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run on the real stack, watched."""
    folder = options.out / f"{'slow' if slow else 'instant'}-{staleness}"
    command = [
        str(COHORT), "train", str(CONFIG), f"run.dir={folder}", f"run.steps={options.steps}",
        f"task.environment={Path(__file__).resolve()}:Clerk",
        f"task.environment_options={{slow: {str(slow).lower()}}}", "rewards.functions=[]",
        f"task.prompts_per_step={AT_ONCE // 8}", "task.group_size=8", "actors.max_tokens=24",
        f"actors.max_staleness={staleness}", "environments.max_turns=8",
    ]  # fmt: skip
    log = options.out / f"{folder.name}.log"
    samples: list[tuple[float, float]] = []
    with log.open("wb") as out:
        run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        core = None
        while run.poll() is None:
            if core is None or not core.is_running():
                core = engine_core(run.pid)
            elif (folder / "metrics.jsonl").exists():
                spent = core.cpu_times()
                samples.append((time.monotonic(), spent.user + spent.system))
            time.sleep(0.1)
    if run.returncode:
        sys.exit(f"{command} failed; see {log}")
    rows = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ][1:]  # the first step warms up
    busy = [
        (spent - before) / (now - then)
        for (then, before), (now, spent) in itertools.pairwise(samples)
    ]
    return {
        "environment": "0.1-2 s" if slow else "instant", "staleness": staleness,
        "step_s": [row["time/step"] for row in rows],
        "generate_s": [row["time/generate"] for row in rows],
        "train_s": [row["time/train"] for row in rows],
        "tokens_per_s": AT_ONCE * sum(row["rollout/completion_tokens"] for row in rows)
        / sum(row["time/step"] for row in rows),
        "engine_cores": statistics.mean(busy),
        # The engine's process looks for work now and then; below this it has found none.
        "engine_idle": sum(share < 0.1 for share in busy) / len(busy),
    }  # fmt: skip


def engine_core(pid: int) -> psutil.Process | None:
    """vLLM's process of a run, once it is there."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        found = [p for p in children if re.search(ENGINE, " ".join(p.cmdline()))]
    except psutil.NoSuchProcess:
        return None
    return found[0] if found else None


async def simulate(count: int, tool_s: tuple[float, float] | None) -> dict[str, Any]:
    """Episodes at once, and one alone for what an episode must take."""
    task = TaskConfig(
        environment=f"{Path(__file__).resolve()}:Clerk",
        environment_options={"slow": tool_s is not None},
    )
    spec = environment_spec(
        task, EnvironmentsConfig(), model_path=str(MODEL), template_arguments={}, max_length=2048
    )
    worker = EnvironmentWorker(spec)
    host = Host(worker)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "Say a number."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    reply = np.asarray([*tokenizer("17")["input_ids"], tokenizer.eos_token_id])
    prompt = Prompt("p", tuple(ids), messages, {})

    async def episode(index: int) -> None:
        waits = random.Random(index)

        async def sample(
            _name: str, _ids: Sequence[int], spec: SamplingSpec, _greedy: bool
        ) -> tuple[RawCompletion, tuple[int, int]]:
            await asyncio.sleep(waits.uniform(*SAMPLE_S))
            none = np.zeros(len(reply), np.float32)
            return RawCompletion(reply, none, "stop", spec.seed), (0, 0)

        request = Request(f"g{index}", prompt, SamplingSpec(24, 1.0, 1, index))
        player = Player(request, 0, host, sample, lambda _: "17", 2048, 0)
        made = await player.play()
        assert made.end is not None and made.end.stop_reason == "done", made.end
        assert len(made.turns) == TURNS

    began = time.monotonic()
    await episode(0)
    first_s = time.monotonic() - began
    process = worker._process
    assert process is not None
    child = psutil.Process(process.pid)
    before = child.memory_info().rss
    lags: list[float] = []

    async def watch() -> None:
        while True:
            at = time.monotonic()
            await asyncio.sleep(0.05)
            lags.append(time.monotonic() - at - 0.05)

    watcher = asyncio.create_task(watch())
    most = before

    async def memory() -> None:
        nonlocal most
        while True:
            most = max(most, child.memory_info().rss)
            await asyncio.sleep(0.2)

    remember = asyncio.create_task(memory())
    began = time.monotonic()
    seconds = []

    async def timed(index: int) -> None:
        at = time.monotonic()
        await episode(index)
        seconds.append(time.monotonic() - at)

    await asyncio.gather(*(timed(index) for index in range(count)))
    wall = time.monotonic() - began
    watcher.cancel()
    remember.cancel()
    process.kill()
    # A mean episode waits TURNS times for a sampler and a tool.
    must = TURNS * (sum(SAMPLE_S) / 2 + (sum(tool_s) / 2 if tool_s else 0))
    return {
        "episodes": count, "tools": "0.1-2 s" if tool_s else "instant", "first_episode_s": first_s,
        "wall_s": wall, "mean_episode_s": statistics.mean(seconds), "mean_it_must_take_s": must,
        "turns_per_s": count * TURNS / wall,
        "kib_an_episode": (most - before) / count / 1024,
        "longest_stall_of_the_loop_s": max(lags),
    }  # fmt: skip


class Host:
    """Calls the worker as its handle does."""

    def __init__(self, worker: EnvironmentWorker) -> None:
        self.begin = worker.begin
        self.step = worker.step
        self._worker = worker

    def forget(self, episode_id: str) -> None:
        asyncio.get_running_loop().create_task(self._worker.forget(episode_id))


def table(runs: list[dict[str, Any]], pools: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = [
        "| tools | max_staleness | step, s: median (range) | generate | train | tokens/s "
        "| engine, cores | engine idle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        step = r["step_s"]
        lines.append(
            f"| {r['environment']} | {r['staleness']} | {statistics.median(step):.1f} "
            f"({min(step):.1f}-{max(step):.1f}) | {statistics.median(r['generate_s']):.1f} "
            f"| {statistics.median(r['train_s']):.1f} | {r['tokens_per_s']:.0f} "
            f"| {r['engine_cores']:.2f} | {r['engine_idle']:.0%} |"
        )
    lines += [
        "",
        "| episodes at once | tools | all done after, s | mean episode, s | without overhead, s "
        "| turns/s | memory of an episode, KiB | longest stall, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in pools:
        lines.append(
            f"| {p['episodes']:,} | {p['tools']} | {p['wall_s']:.1f} | {p['mean_episode_s']:.1f} "
            f"| {p['mean_it_must_take_s']:.1f} | {p['turns_per_s']:.0f} "
            f"| {p['kib_an_episode']:.0f} | {p['longest_stall_of_the_loop_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--episodes", type=int, nargs="+", default=[64, 1000, 4000])
    parser.add_argument("--only", choices=["real", "simulated"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-slow-tools")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    pools: list[dict[str, Any]] = []
    if options.only != "real":
        for count in options.episodes:
            for tool_s in (None, TOOL_S):
                pools.append(asyncio.run(simulate(count, tool_s)))
                print(pools[-1], flush=True)
    if options.only != "simulated":
        for staleness in (0, 1):
            for slow in (False, True):
                runs.append(real(slow, staleness, options))
                print(runs[-1], flush=True)
    save(options.out, table(runs, pools), runs=runs, pools=pools)


if __name__ == "__main__":
    main()
