"""A real run under faults: what is lost, how long each kind of fault costs, and how much is left.

    .venv/bin/python benchmarks/chaos.py [--minutes 30] [--every 120] [--seed 0] [--out FOLDER]
    .venv/bin/python benchmarks/chaos.py --short [--kinds KIND ...]

Runs `cohort train deploy/configs/addition.yaml --supervise` twice for the same time: once left
alone, once with a fault every two minutes, of every kind in turn in a random order. A fault is a
signal to a real process of the run. Writes FOLDER/results.json and FOLDER/results.md. --short: one
run without its twin, in which a fault follows as soon as the one before is overcome; of three kinds
unless others are given, a few minutes. Words after `--` are keys of the config.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import COHORT, CONFIG, ROOT, save

MARK = "COHORT_CHAOS"
TRY_AGAIN = 75
LOOK_S = 0.1
# Steps that no campaign reaches.
ENDLESS = 100_000
# A run that has not gone on after so long never will.
PATIENCE_S = 900.0
# Longest wait for a process of the kind to be there, and for a stopped run to end.
FIND_S, END_S = 120.0, 300.0


class Kind(NamedTuple):
    """A fault: which signal goes to which process; an expression finds it by its title."""

    victim: str
    signal: signal.Signals


# The supervisor and its driver have the same program: the driver is the one without this word.
SUPERVISOR, DRIVER = "--supervise", "cohort.cluster.cli train"
# vLLM's process; it fails to give itself its name now and then, by the order of its environment.
ENGINE = r"VLLM::EngineCore|multiprocessing\.spawn import spawn_main"
KINDS = {
    "engine killed": Kind(ENGINE, signal.SIGKILL),
    "engine frozen": Kind(ENGINE, signal.SIGSTOP),
    "rollout actor killed": Kind("ray::RolloutActor", signal.SIGKILL),
    "reward worker killed": Kind("ray::RewardWorker", signal.SIGKILL),
    "reward worker frozen": Kind("ray::RewardWorker", signal.SIGSTOP),
    "rollout writer killed": Kind("ray::_Writer", signal.SIGKILL),
    "journal killed": Kind("ray::JournalActor", signal.SIGKILL),
    "learner's home killed": Kind("ray::LearnerHome", signal.SIGKILL),
    "learner rank killed": Kind("ray::LearnerWorker", signal.SIGKILL),
    "learner rank frozen": Kind("ray::LearnerWorker", signal.SIGSTOP),
    "driver killed": Kind(DRIVER, signal.SIGKILL),
    "driver frozen": Kind(DRIVER, signal.SIGSTOP),
    "raylet killed": Kind("raylet/raylet", signal.SIGKILL),
    "GCS killed": Kind("gcs/gcs_server", signal.SIGKILL),
    "pre-empted": Kind(SUPERVISOR, signal.SIGTERM),
}
SHORT = ("engine killed", "driver killed", "reward worker killed")


@dataclass
class Fault:
    """One fault and what came of it.

    Attributes:
        kind: A key of KINDS.
        at_s: Seconds from the first step to the fault.
        steps: That were done before it.
        gap_s: The longest time between two steps until then.
        regained_s: From the fault to the end of the first step that began after it.
        repeated: Steps that were done again.
    """

    kind: str
    at_s: float
    steps: int
    gap_s: float = math.nan
    regained_s: float = math.nan
    repeated: int = 0


@dataclass
class Outcome:
    """What a run has done.

    Attributes:
        steps: Recorded at the end.
        wall_s: From its first step to its last.
        step_s: Median of its steps, without those that a fault was in.
        lost: Completions that its record lacks. doubled: That it has twice.
        failed: That it counts as failed.
        differing: Steps whose prompts are not those of the run that was left alone.
    """

    steps: int
    wall_s: float
    step_s: float
    lost: int
    doubled: int
    failed: int
    faults: list[Fault] = field(default_factory=list)
    differing: int = 0


class Trial:
    """A supervised run of the real stack and its processes; started again when it asks for that."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.mark = uuid.uuid4().hex
        self._keys = list(keys)
        self._log = folder / "train.log"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Give the command, as a scheduler would: it goes on where there is something."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [
                    *(str(COHORT), "train", str(CONFIG), "--supervise", f"run.dir={self.run_dir}"),
                    *("run.resume=true", f"run.steps={ENDLESS}", *self._keys),
                ],
                cwd=ROOT,
                env={**os.environ, MARK: self.mark, "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """The living processes of this run with their titles.

        They have its mark in their environment, or are below one that has: a process that sets its
        own title may write it over a part of what it was started with.
        """
        entry = f"{MARK}={self.mark}".encode()
        titles: dict[int, tuple[psutil.Process, str]] = {}
        parents: dict[int, int] = {}
        marked: set[int] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # Where a title was written there is a hole, at which psutil stops to read.
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                titles[process.pid] = (process, " ".join(process.cmdline()))
                parents[process.pid] = process.ppid()
                if entry in environment.split(b"\0"):
                    marked.add(process.pid)
        for number in sorted(with_descendants(marked, parents)):
            yield titles[number]

    def victim(self, kind: Kind) -> psutil.Process | None:
        """A process of this kind, one that does what the run needs now."""
        for process, title in self.processes():
            supervises = SUPERVISOR in title
            if re.search(kind.victim, title) and (kind.victim == SUPERVISOR) == supervises:
                return process
        return None

    def look(self) -> None:
        """Start the run again where it was pre-empted. Raises RuntimeError where it has ended."""
        code = self.process.poll()
        if code == TRY_AGAIN:
            self.process = self.start()
        elif code is not None:
            raise RuntimeError(f"the run ended with exit code {code}; see {self._log}")

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl, in its order; a line that is being written is left out."""
        return [json_step(line) for line in complete_lines(self.run_dir / "metrics.jsonl")]

    def end(self) -> None:
        """Stop the run; what still lives of it afterwards is killed and reported as an error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(END_S)
        deadline = time.monotonic() + 60
        while (left := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process, _ in left:
            process.kill()
        if left:
            raise RuntimeError(f"the run has left processes: {[title for _, title in left]}")


def with_descendants(processes: set[int], parents: Mapping[int, int]) -> set[int]:
    """Processes and all below them. parents: by child.

    Nothing follows from a number's size: the system begins again at the lowest after 32768."""
    found: set[int] = set()
    new = set(processes)
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


def complete_lines(file: Path) -> list[str]:
    """The lines of a file that may be written to or be missing now."""
    try:
        return file.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []


def json_step(line: str) -> int:
    return int(json.loads(line)["step"])


class Watch:
    """Sees steps when they are recorded: a run that goes on from a checkpoint repeats some."""

    def __init__(self, trial: Trial, clock: Callable[[], float] = time.monotonic) -> None:
        self._trial = trial
        self._clock = clock
        self._size = -1
        self._last = -1
        self.seen: list[tuple[float, int]] = []

    def look(self) -> None:
        """Take in what was recorded since the last look."""
        file = self._trial.run_dir / "metrics.jsonl"
        size = file.stat().st_size if file.is_file() else 0
        if size == self._size:
            return
        steps = self._trial.steps()
        if size < self._size:
            # It was cut back to the checkpoint; what follows is done again.
            self._last = len(steps) - 1
        self._size = size
        self.seen += [(self._clock(), step) for step in steps if step > self._last]
        self._last = max(self._last, *steps) if steps else self._last

    @property
    def furthest(self) -> int:
        """The steps done so far."""
        return max((step for _, step in self.seen), default=-1) + 1


def wait_until(trial: Trial, watch: Watch, what: Callable[[], bool], timeout_s: float) -> bool:
    """Look until something holds. False: it did not within `timeout_s`."""
    ends = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > ends:
            return False
        trial.look()
        watch.look()
        time.sleep(LOOK_S)
    return True


def strike(trial: Trial, watch: Watch, kind: str) -> Fault:
    """Send one fault, and wait until the run has a step that began after it.

    The step in work may end in spite of the fault; the one after that is new in any case."""
    found: list[psutil.Process] = []

    def there() -> bool:
        victim = trial.victim(KINDS[kind])
        found.extend([victim] if victim else [])
        return bool(found)

    if not wait_until(trial, watch, there, FIND_S):
        raise RuntimeError(f"no process {KINDS[kind].victim} for: {kind}")
    before, at = len(watch.seen), time.monotonic()
    done = watch.furthest
    found[0].send_signal(KINDS[kind].signal)
    if not wait_until(trial, watch, lambda: watch.furthest > done + 1, PATIENCE_S):
        raise RuntimeError(f"{kind}: no new step within {PATIENCE_S:g} s")
    with contextlib.suppress(psutil.NoSuchProcess):
        if KINDS[kind].signal == signal.SIGSTOP:
            # Whoever was frozen is replaced by now, and should have been ended.
            found[0].resume()
    after = watch.seen[before:]
    times = [when for when, _ in watch.seen[before - 1 :]]
    return Fault(
        kind,
        at - watch.seen[0][0],
        done,
        gap_s=max(end - start for start, end in pairwise(times)),
        regained_s=after[-1][0] - at,
        repeated=sum(step < done for _, step in after),
    )


def order(kinds: Sequence[str], seed: int) -> Iterator[str]:
    """Kinds in random order, each as often as every other one."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(kinds, len(kinds))


def outcome(trial: Trial, watch: Watch, faults: Sequence[Fault]) -> Outcome:
    """Read what a run has recorded, once it has ended."""
    metrics = [json.loads(line) for line in complete_lines(trial.run_dir / "metrics.jsonl")]
    ids: Counter[tuple[int, str]] = Counter()
    for step in range(len(metrics)):
        for line in complete_lines(trial.run_dir / "rollouts" / f"step-{step:06d}.jsonl"):
            ids[step, json.loads(line)["completion_id"]] += 1
    last = metrics[-1]
    failed = int(last["samples/failed"])
    return Outcome(
        steps=len(metrics),
        wall_s=watch.seen[-1][0] - watch.seen[0][0],
        step_s=statistics.median(row["time/step"] for row in metrics),
        lost=int(last["samples/admitted"]) - failed - len(ids),
        doubled=sum(ids.values()) - len(ids),
        failed=failed,
        faults=list(faults),
    )


def prompts(run_dir: Path, step: int) -> set[str]:
    """The prompts of a recorded step."""
    lines = complete_lines(run_dir / "rollouts" / f"step-{step:06d}.jsonl")
    return {json.loads(line)["group_id"] for line in lines}


def differing(one: Path, other: Path, steps: int) -> int:
    """Steps of two runs that were not trained on the same prompts."""
    return sum(prompts(one, step) != prompts(other, step) for step in range(steps))


def campaign(
    folder: Path, kinds: Iterator[str], seconds: float, every_s: float, keys: Sequence[str]
) -> Outcome:
    """Train for so many seconds from the first step on, with a fault every `every_s`.

    kinds: of the faults; when there are no more, none follows.
    """
    trial = Trial(folder, keys)
    watch, faults = Watch(trial), []
    try:
        if not wait_until(trial, watch, lambda: watch.furthest >= 2, PATIENCE_S):
            raise RuntimeError(f"no step within {PATIENCE_S:g} s; see {folder}/train.log")
        began = watch.seen[0][0]
        for number, kind in enumerate(kinds, 1):
            due = began + number * every_s
            if due > began + seconds:
                break
            wait_until(trial, watch, lambda due=due: time.monotonic() >= due, math.inf)
            faults.append(strike(trial, watch, kind))
            print(json.dumps(asdict(faults[-1])), flush=True)
        wait_until(trial, watch, lambda: time.monotonic() >= began + seconds, math.inf)
    finally:
        trial.end()
    watch.look()
    return outcome(trial, watch, faults)


def effective(run: Outcome, undisturbed: Outcome) -> float:
    """The fraction of the time that went into steps: what was done, at the pace of a run alone."""
    pace = undisturbed.wall_s / max(1, undisturbed.steps - 1)
    return (run.steps - 1) * pace / run.wall_s


def table(run: Outcome, undisturbed: Outcome | None) -> str:
    """The tables of benchmarks/README.md."""
    lines = [
        "| fault | times | longest time without a step, s | to a new step, s | steps again |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(fault.kind for fault in run.faults):
        of_kind = [fault for fault in run.faults if fault.kind == kind]
        lines.append(
            f"| {kind} | {len(of_kind)} | {max(fault.gap_s for fault in of_kind):.1f} "
            f"| {max(fault.regained_s for fault in of_kind):.1f} "
            f"| {max(fault.repeated for fault in of_kind)} |"
        )
    lines += [
        "",
        f"{run.steps} steps in {run.wall_s:.0f} s, {len(run.faults)} faults. Completions lost: "
        f"{run.lost}, doubled: {run.doubled}, failed: {run.failed}.",
    ]
    if undisturbed is not None:
        lines.append(
            f"Left alone: {undisturbed.steps} steps in {undisturbed.wall_s:.0f} s. Effective "
            f"training time: {effective(run, undisturbed):.0%}. Steps with other prompts: "
            f"{run.differing}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=120, help="seconds between faults")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    words = sys.argv[1:]
    mine = words[: words.index("--")] if "--" in words else words
    given, keys = parser.parse_args(mine), words[len(mine) + 1 :]
    if given.short:
        run = campaign(given.out / "faults", iter(given.kinds or SHORT), 1, 0, keys)
        save(given.out, table(run, None), faults=asdict(run))
        return
    seconds = 60 * given.minutes
    alone = campaign(given.out / "alone", iter(()), seconds, given.every, keys)
    kinds = order(given.kinds or list(KINDS), given.seed)
    run = campaign(given.out / "faults", kinds, seconds, given.every, keys)
    steps = min(run.steps, alone.steps)
    run.differing = differing(given.out / "alone" / "run", given.out / "faults" / "run", steps)
    figures = {"effective": effective(run, alone), "seed": given.seed, "every_s": given.every}
    save(given.out, table(run, alone), **figures, faults=asdict(run), alone=asdict(alone))


if __name__ == "__main__":
    main()
