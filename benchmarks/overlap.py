"""What overlap pays: seconds a step for several values of actors.max_staleness and cluster.cores.

    python benchmarks/overlap.py --steps 12 --staleness 0 1 2 4 --cores shared own
    python benchmarks/overlap.py --simulated 64

Completions have a skewed distribution of lengths, which an untrained model of the quickstart gives:
most are short, a few run into the limit. The first steps (of the start, and of filling the buffer)
are left out. With perfect overlap a step takes max(generate, train) + sync, where generate and
train are those of the synchronous run.

--simulated: a pool of so many engines in virtual time (`tests/harness`), with one token in 50 ms
and a learner step of 2 s: what the program itself loses, on machines that this one is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cohort.cluster.placement import Resources

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 3


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of one run, seconds.

    Attributes:
        staleness: `actors.max_staleness`.
        cores: `cluster.cores`.
        step: The whole step; generate, train, sync: what the learner waited for, did, waited for.
        tokens: Mean completion tokens of a step's completions.
    """

    staleness: int
    cores: str
    step: float
    generate: float
    train: float
    sync: float
    tokens: float


def measured(folder: Path, staleness: int, cores: str) -> Measured:
    """The medians of a run's metrics."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][SKIPPED:]

    def median(key: str) -> float:
        return round(statistics.median(row[key] for row in rows), 3)

    times = (median(f"time/{part}") for part in ("step", "generate", "train", "sync"))
    return Measured(staleness, cores, *times, median("rollout/completion_tokens"))


def real(config: Path, steps: int, staleness: int, cores: str, more: list[str]) -> Measured:
    """One run of the real program."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        keys = [f"run.dir={run_dir}", f"run.steps={steps}", f"actors.max_staleness={staleness}"]
        keys += ["run.checkpoint_every=0", "tracking.wandb=disabled", f"cluster.cores={cores}"]
        command = [sys.executable, "-m", "cohort.cluster.cli", "train", str(config), *keys, *more]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return measured(run_dir, staleness, cores)


def simulated(engines: int, steps: int, staleness: int) -> Measured:
    """One run of the program on stand-ins, in virtual time."""
    sys.path.insert(0, str(ROOT))
    from tests.harness import world
    from tests.models import tiny_llama

    world.MACHINE = Resources(cpus=2 * engines, gpus=0, memory=1 << 50)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = world.World(
            place / "run",
            tiny_llama(place / "model"),
            run__steps=steps,
            actors__count=engines,
            actors__max_staleness=staleness,
            actors__max_tokens=80,
            actors__max_concurrent=8,
            task__prompts_per_step=2 * engines,
        )
        if run.train() != 0:
            raise SystemExit("the simulated run failed")
        return measured(run.folder, staleness, "simulated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/configs/addition.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--cores", nargs="+", default=["shared", "own"])
    parser.add_argument("--simulated", type=int, metavar="ENGINES")
    parser.add_argument("keys", nargs="*", help="More config keys, key=value.")
    given = parser.parse_args()
    found: list[Measured] = []
    for staleness in given.staleness:
        if given.simulated:
            found.append(simulated(given.simulated, given.steps, staleness))
        else:
            found += [
                real(given.config, given.steps, staleness, cores, given.keys)
                for cores in given.cores
                if staleness or cores == "shared"
            ]
    alone = found[0]
    ideal = max(alone.generate, alone.train) + alone.sync
    for one in found:
        print(
            f"staleness {one.staleness}, {one.cores}: {one.step:.2f} s a step = generate "
            f"{one.generate:.2f} + train {one.train:.2f} + sync {one.sync:.2f}; "
            f"{one.step / ideal:.2f} of max(generate, train) + sync"
        )
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
