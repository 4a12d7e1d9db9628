"""A whole run of the product in one process, in virtual time: seconds of training in milliseconds.

    world = World(tmp_path, run__steps=5, actors__max_staleness=1)
    world.on("step", lambda event: world.ray.kill("rollout-0"))   # a death in every learner step
    assert world.train() == 0
    rows = world.rows()

`train` is the product's `run_training`: config, preparation, run directory, RolloutPool,
RewardPool, Learner, GroupStream, the loop, metrics, checkpoints and the goodbye are the real
ones, and so are RolloutActor (its gate, versions, refusals), Engine and RewardWorker. Stand-ins are

- Ray (`local_ray.py`): actors in this process that can be killed, frozen, slowed, and whose objects
  can be lost, as Ray's can;
- vLLM (`engine.py`): prefix cache, pausing, weight updates and seeded sampling of a policy that
  fits into two numpy vectors (`policy.py`);
- DeepSpeed (`learner.py`): ranks that hold these vectors and an optimizer with momentum;
- the reward worker's child process (`rewards.py`), and that of environments (`environments.py`);
- time (`clock.py`): a loop that jumps to the next timer. `time.monotonic` follows it.

A run writes its folder as a real one does, so `train` again with `run__resume=True` continues it.
`train_in_child` runs it in a forked process, for tests that end the driver itself by a signal.
W&B is off. Nothing here starts a process or opens a port.

How to interfere: `world.on(kind, action, actor=..., what=..., nth=...)`, see `World.on`, with
`world.ray.kill(name)`, `.freeze(name)`, `.thaw(name)`, `.slow[name] = 10` and `ref.lose()`.
Events of stand-ins: `update` (an engine loads weights; reply "ignore" makes it keep the old ones),
`reset` (of a prefix cache), `publish`, `step` (reply "nonfinite"), `save` (by a rank; without
a folder where it only prepares one), `write` and `written` (of a rank's copy, by the owner of the
memory); and `call`/`done` of every method of every actor, with `detail["args"]` and
`detail["answer"]`, and `stored` with the `detail["ref"]` of what stays in the object store;
`answer` of an environment's process.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from ray.exceptions import OutOfMemoryError

import cohort
import cohort.actors.rollout
import cohort.cluster.commands.train
import cohort.cluster.launch
import cohort.cluster.prepare
import cohort.cluster.ray_start
import cohort.rewards.environments.worker
from cohort.cluster.commands.replay import Range, run_replay
from cohort.cluster.commands.train import run_training
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import GIB, Resources
from cohort.cluster.session import Session
from cohort.learner.checkpoint import latest, load_state
from tests.harness import clock, policy
from tests.harness.engine import LocalRolloutActor, install_vllm
from tests.harness.environments import LocalEnvironmentWorker, start_here
from tests.harness.learner import LocalLearnerHome, LocalLearnerWorker
from tests.harness.local_ray import NODE, Event, LocalRay
from tests.harness.rewards import LoadedHere, LocalRewardWorker

T = TypeVar("T")
STAND_INS = {
    "RolloutActor": LocalRolloutActor,
    "LearnerHome": LocalLearnerHome,
    "LearnerWorker": LocalLearnerWorker,
    "RewardWorker": LocalRewardWorker,
    "EnvironmentWorker": LocalEnvironmentWorker,
}
MACHINE = Resources(cpus=16, gpus=0, memory=64 * GIB)
CONFIG = Path(__file__).parent / "world.yaml"


class World:
    """A run directory, and the runs that are made in it.

    overrides: config keys, `a__b` for a.b. ray: of the current or last run; a new one each time.
    run: what `loop.train` got. nodes: machines of the cluster, over which actors are spread. slow:
    how many times longer than usual an actor takes, by name.
    """

    def __init__(self, folder: Path, model: Path, **overrides: Any) -> None:
        self.folder = folder
        self.model = model
        self.overrides = overrides
        self.ray = LocalRay(STAND_INS)
        self.run: Any = None
        self.nodes = 1
        self.slow: dict[str, float] = {}
        self.loop: clock.VirtualLoop | None = None
        self._hooks: list[Callable[[Event], None]] = []
        # A killed driver's watcher would remove what it leaves there; a stand-in has none.
        self._shm = folder.parent / f"{folder.name}-shm"

    def config(self, **overrides: Any) -> Config:
        keys = {"run__dir": self.folder, "model__path": self.model, **self.overrides, **overrides}
        pairs = [f"{name.replace('__', '.')}={_text(value)}" for name, value in keys.items()]
        return load_config(CONFIG, pairs)

    def on(
        self,
        kind: str,
        action: Callable[[Event], Any],
        *,
        actor: str | None = None,
        what: str | None = None,
        nth: int | None = None,
    ) -> None:
        """Have something done at events of a kind, in every run from now on.

        actor, what: only events of this actor (or of names that begin so), of this method. nth:
        only the nth of these, counted from 1.
        """
        seen = 0

        def hook(event: Event) -> None:
            nonlocal seen
            if event.kind != kind or (what is not None and event.what != what):
                return
            if actor is not None and not event.actor.startswith(actor):
                return
            seen += 1
            if nth is None or seen == nth:
                action(event)

        self._hooks.append(hook)

    def forget_hooks(self) -> None:
        self._hooks.clear()

    def train(self, **overrides: Any) -> int:
        """The product's exit code; raises what the run raises."""
        config = self.config(**overrides)
        return self._here(lambda: run_training(config))

    def session(
        self, body: Callable[[Session], Coroutine[Any, Any, None]], **overrides: Any
    ) -> None:
        """Run a loop of a user's own, between the start and the end of `cohort.launch`."""
        config = self.config(**overrides)

        async def command() -> int:
            async with cohort.launch(config) as session:
                await body(session)
            return 0

        self._here(command)

    def replay(self, steps: str = ":") -> tuple[int, list[str]]:
        """The exit code of `cohort replay`, and the lines of its table."""
        lines: list[str] = []
        with Console(1, "plain") as console:
            code = self._here(
                lambda: run_replay(self.folder, Range.parse(steps), console, lines.append)
            )
        return code, lines

    def _here(self, command: Callable[[], Coroutine[Any, Any, int]]) -> int:
        """Run a command in this world."""
        self.ray = LocalRay(STAND_INS)
        self.ray.hooks = list(self._hooks)
        self.ray.slow = dict(self.slow)
        self.ray.node_names = [NODE, *(f"{number:056x}" for number in range(1, self.nodes))]
        with pytest.MonkeyPatch.context() as patch:
            install_vllm(patch)
            patch.setenv("WANDB_MODE", "disabled")
            patch.setattr(cohort.cluster.ray_start, "this_machine", lambda: MACHINE)
            patch.setattr(cohort.cluster.launch, "this_machine", lambda: MACHINE)
            patch.setattr(cohort.cluster.prepare, "RewardWorker", LoadedHere)
            patch.setattr(cohort.cluster.prepare, "try_environment", lambda _: None)
            environments = cohort.rewards.environments.worker
            patch.setattr(environments, "start_process", start_here)
            patch.setattr(environments, "hide_environment", lambda: None)
            self._shm.mkdir(parents=True, exist_ok=True)
            patch.setattr(cohort.cluster.launch, "SHM", self._shm)
            patch.setattr(cohort.actors.rollout, "SHM", self._shm)
            real_train = cohort.cluster.commands.train.train

            async def train(run: Any) -> Any:
                self.run = run
                return await real_train(run)

            patch.setattr(cohort.cluster.commands.train, "train", train)

            async def main() -> int:
                with self.ray.install(patch):
                    self.loop = asyncio.get_running_loop()  # type: ignore[assignment]
                    return await command()

            return clock.run(main())

    def train_in_child(self, **overrides: Any) -> int:
        """As `train` in a forked process; minus the signal's number when a signal ended it."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = self.train(**overrides)
            except BaseException as error:  # noqa: BLE001 - the child's last words
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    def stop(self) -> None:
        """Ask the run to stop, as Ctrl-C does."""
        self.run.stop.set()

    def sleep_until(self, seconds: float, action: Callable[[], Any]) -> None:
        """Do something after this much virtual time of the run that is going on."""
        asyncio.get_running_loop().call_later(seconds, action)

    # What a run left behind.

    def rows(self) -> list[dict[str, Any]]:
        return _json_lines(self.folder / "metrics.jsonl")

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        return _json_lines(self.folder / "rollouts" / f"step-{step:06d}.jsonl")

    def checkpoint(self) -> Path:
        found = latest(self.folder / "checkpoints")
        assert found is not None, "no complete checkpoint"
        return found

    def newest(self) -> int:
        """Steps that the last checkpoint has; 0 without one."""
        found = latest(self.folder / "checkpoints")
        return 0 if found is None else int(load_state(found)["step"])

    def state(self) -> dict[str, Any]:
        return load_state(self.checkpoint())

    def weights(self) -> policy.Weights:
        """Of the last checkpoint."""
        return policy.read(self.checkpoint() / "hf" / "model.safetensors")

    def events(self, *kinds: str, actor: str = "") -> list[Event]:
        return [e for e in self.ray.events if e.kind in kinds and e.actor.startswith(actor)]

    def trained(self) -> list[str]:
        """The ids of all completions that rank 0 trained in the last run, step by step."""
        steps = self.events("step", actor="learner-0")
        return [name for event in steps for name in event.detail["completions"]]

    @property
    def time(self) -> float:
        """Virtual seconds since the run began."""
        assert self.loop is not None
        return self.loop.now - clock.START_S


def in_cluster(main: Callable[[LocalRay], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine that is given a LocalRay, for tests of one part without a whole run."""
    ray = LocalRay(STAND_INS)
    with pytest.MonkeyPatch.context() as patch:
        install_vllm(patch)

        async def program() -> T:
            with ray.install(patch):
                ray.init()
                try:
                    return await main(ray)
                finally:
                    ray.shutdown()

        return clock.run(program())


class Chaos:
    """Breaks things at random, the same for every seed, in every run of a world from now on.

    kill, freeze, out_of_memory: shares of the calls of the actors at which the actor ends so. lose:
    share of the completions and groups that are lost once rollout actors have stored them. done:
    what was broken, in order. actors: how the names of those that it may hit begin. after: the kind
    of the event from which on it does so; empty: from the start.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        actors: tuple[str, ...] = ("rollout", "reward"),
        after: str = "",
        **shares: float,
    ) -> None:
        self.done: list[str] = []
        self._actors = actors
        self._waits_for = after
        self._world = world
        self._dice = random.Random(seed)
        self._shares = shares
        world._hooks.append(self._hook)

    def _happens(self, what: str, event: Event) -> bool:
        happens = self._dice.random() < self._shares.get(what, 0.0)
        if happens:
            self.done.append(f"{what} {event}")
        return happens

    def _hook(self, event: Event) -> None:
        ray = self._world.ray
        if self._waits_for:
            if event.kind == self._waits_for:
                self._waits_for = ""
            return
        if not event.actor.startswith(self._actors):
            return
        if event.kind == "call":
            if self._happens("kill", event):
                ray.kill(event.actor)
            elif self._happens("freeze", event):
                ray.freeze(event.actor)
            elif self._happens("out_of_memory", event):
                ray.kill(event.actor, OutOfMemoryError("killed by Ray's memory monitor"))
        elif (
            event.kind == "stored"
            and event.actor.startswith("rollout")
            and self._happens("lose", event)
        ):
            event.detail["ref"].lose()


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
