"""Environments whose processes are in this process, and one that the stand-in policy can play.

The product's own EnvironmentWorker, its episodes and their Host run here, in virtual time; the
process between them is a stand-in that answers as the real one does: by value, until it dies.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import tempfile
from collections.abc import Mapping
from typing import Any

from cohort.rewards.environments.base import Reply, Step
from cohort.rewards.environments.host import Host
from cohort.rewards.environments.process import CallFailed, ProcessLost
from cohort.rewards.environments.worker import EnvironmentSpec, EnvironmentWorker
from cohort.rewards.results import error_tail
from tests.harness.local_ray import current_actor, current_ray

PROCESS_S = 1.0


class Talk:
    """Says something to every reply, and ends when the tokens of one add up to a multiple of 3."""

    def __init__(self, seconds: float = 0.3) -> None:
        self._seconds = seconds
        self.turns, self._open = 0, False

    async def reset(self, row: Mapping[str, Any], seed: int) -> str:  # noqa: ARG002
        self._open = True
        await asyncio.sleep(self._seconds)
        return f"Game {seed % 100}."

    async def close(self) -> None:
        self._open = False

    async def step(self, reply: Reply) -> Step:
        await asyncio.sleep(self._seconds)
        self.turns += 1
        done = sum(reply.token_ids) % 3 == 0
        return Step(f"Turn {self.turns}.", reward=float(sum(reply.token_ids) % 5), done=done)


class Broken(Talk):
    """Fails in its first turn."""

    async def step(self, reply: Reply) -> Step:  # noqa: ARG002
        raise RuntimeError("the bank is closed")


class LocalProcess:
    """A HostProcess without a process. Events: `answer` of every call, before it is made, with
    `detail["process"]` (this), `detail["episode"]` and `detail["arguments"]`."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._host = Host(
            {
                "path": spec.path,
                "stubs": tempfile.gettempdir(),
                "options": dict(spec.options),
                "message_chars": spec.message_chars,
            }
        )
        make = self._host._factory
        self._made: list[Any] = []

        def made(**options: Any) -> Any:
            self._made.append(make(**options))
            return self._made[-1]

        self._host._factory = made
        self._ray, self._actor = current_ray(), current_actor()
        self._lost: ProcessLost | None = None
        self._waiting: set[asyncio.Task[Any]] = set()
        self._ray.processes.append(self)
        self.episodes: set[str] = set()
        self.retired = False
        self.pid = len(self._ray.processes)
        self._life = self._actor.life

    @property
    def alive(self) -> bool:
        return self._lost is None

    @property
    def left(self) -> list[str]:
        """What it holds of episodes; nothing once it has ended."""
        if self._lost is not None or self._actor.life != self._life:
            return []
        held = [*self._host._episodes, *self.episodes]
        return held + [f"not closed: {one}" for one in self._made if one._open]

    async def call(
        self, episode: str, what: str, arguments: Mapping[str, Any], timeout_s: float | None
    ) -> dict[str, Any]:
        if self._lost is not None:
            raise self._lost
        payload = pickle.dumps(dict(arguments))
        task = asyncio.create_task(self._answer(episode, what, payload))
        self._waiting.add(task)
        try:
            async with asyncio.timeout(timeout_s):
                return await task
        except asyncio.CancelledError:
            if self._lost is not None:
                raise self._lost from None
            raise
        finally:
            self._waiting.discard(task)

    async def _answer(self, episode: str, what: str, payload: bytes) -> dict[str, Any]:
        arguments = pickle.loads(payload)
        self._ray.emit(
            "answer", self._actor.name, what, process=self, episode=episode, arguments=arguments
        )
        # A hook may have ended this process.
        await asyncio.sleep(0)
        try:
            answer = await self._host.answer(episode, what, arguments)
        except Exception as error:
            raise CallFailed(error_tail(error)) from error
        found: dict[str, Any] = json.loads(json.dumps(answer))
        return found

    def kill(self) -> None:
        self._lost = self._lost or ProcessLost("the process of environments was killed by SIGKILL")
        for task in self._waiting:
            task.cancel()


async def start_here(spec: EnvironmentSpec) -> LocalProcess:
    """In the place of the product's `start_process`."""
    await asyncio.sleep(PROCESS_S * current_ray().slowness(current_actor().name))
    return LocalProcess(spec)


class LocalEnvironmentWorker(EnvironmentWorker):
    """The product's EnvironmentWorker under a shorter name."""

    kind = "environment"
