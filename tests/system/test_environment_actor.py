"""Workers of environments inside real Ray: what dies is begun again, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cohort.actors.engine import RawCompletion
from cohort.actors.play import Player
from cohort.actors.records import Completion, Prompt, Request, SamplingSpec
from cohort.rewards.config import EnvironmentsConfig, TaskConfig
from cohort.rewards.environments.handle import EnvironmentHandle
from cohort.rewards.environments.specs import environment_spec
from cohort.rewards.environments.worker import EnvironmentWorker
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.system

COUNT = 6
COUNTER = '''
import os
from pathlib import Path


class Counter:
    """Ends after three replies; says which process it lives in."""

    def reset(self, row, seed):
        (Path(row["folder"]) / str(os.getpid())).touch()
        self.left = 3

    def step(self, reply):
        import cohort

        self.left -= 1
        return cohort.Step("Go on.", reward=1.0, done=self.left == 0)
'''


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def actor(tmp_path: Path, tiny_model: Path) -> Iterator[Any]:
    file = tmp_path / "counter.py"
    file.write_text(COUNTER)
    spec = environment_spec(
        TaskConfig(environment=f"{file}:Counter"),
        EnvironmentsConfig(),
        model_path=str(tiny_model),
        template_arguments={},
        max_length=2048,
    )
    # As `cohort.cluster.launch` makes them.
    made = (
        ray.remote(EnvironmentWorker)
        .options(num_cpus=0, max_restarts=-1, max_concurrency=1000)
        .remote(spec)
    )
    yield made
    ray.kill(made)


async def played(
    handle: EnvironmentHandle, folder: Path, between: Any = None
) -> tuple[list[Completion], list[str]]:
    """Episodes side by side, and what was sampled; between: done once all are in their 2nd turn."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "Count."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = Prompt("p", tuple(ids), messages, {"folder": str(folder)})
    reply = np.asarray([*tokenizer("1")["input_ids"], tokenizer.eos_token_id])
    sampled: list[str] = []
    waiting, go = asyncio.Semaphore(0), asyncio.Event()
    if between is None:
        go.set()

    async def sample(
        name: str, _ids: Sequence[int], spec: SamplingSpec, _greedy: bool
    ) -> tuple[RawCompletion, tuple[int, int]]:
        sampled.append(name)
        if name.endswith("/1"):
            waiting.release()
            await go.wait()
        none = np.zeros(len(reply), np.float32)
        return RawCompletion(reply, none, "stop", spec.seed), (0, 0)

    async def disturb() -> None:
        if between is not None:
            for _ in range(COUNT):
                await waiting.acquire()
            between()
            go.set()

    players = [
        Player(
            Request(f"g{n}", prompt, SamplingSpec(8, 1.0, 1, n)), 0, handle, sample,
            lambda _: "1", 2048, 0,
        )
        for n in range(COUNT)
    ]  # fmt: skip
    made, _ = await asyncio.gather(
        asyncio.gather(*(player.play() for player in players)), disturb()
    )
    return list(made), sampled


def processes(folder: Path) -> set[int]:
    return {int(file.name) for file in folder.iterdir()}


@pytest.mark.parametrize("victim", ["worker", "process"])
def test_episodes_of_a_dead_worker_are_begun_again_once(
    actor: Any, tmp_path: Path, victim: str
) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()

    def kill() -> None:
        [process] = processes(folder)
        pid = psutil.Process(process).ppid() if victim == "worker" else process
        os.kill(pid, signal.SIGKILL)

    handle = EnvironmentHandle(actor, 30)
    made, sampled = asyncio.run(asyncio.wait_for(played(handle, folder, kill), 120))
    for completion in made:
        assert completion.end is not None
        assert completion.end.stop_reason == "done", completion.end
        assert completion.end.rewards == (1.0, 1.0, 1.0)
        assert len(completion.turns) == 3
    # Two turns that were lost, and three.
    assert len(sampled) == COUNT * 5
    ray.kill(actor)
    deadline = time.monotonic() + 30
    while alive := [pid for pid in processes(folder) if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
