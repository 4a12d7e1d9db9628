"""The real RolloutActor around a stand-in engine, behind what looks like a Ray handle.

Gate, versions and book-keeping are the program's own; only tokens are made up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError

from cohort.actors.engine import RawCompletion
from cohort.actors.records import Failure, Place, Prompt, Request, SamplingSpec, WeightsInfo
from cohort.actors.rollout import RolloutActor

PROBE = [1, 2, 3]
LEARNER = [-1.0, -2.0]


def info(version: int) -> WeightsInfo:
    return WeightsInfo(version, ("w",), "", 1, f"/nowhere/{version}", "local")


def request(
    name: str, samples: int = 2, step: int = 0, tokens: int = 4, oldest: int = 0
) -> Request:
    prompt = Prompt(name, (1, 2), "p")
    return Request(name, prompt, SamplingSpec(tokens, 1.0, samples, 0), step=step, oldest=oldest)


class Tokenizer:
    eos_token_id = pad_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class StandInEngine:
    """Produces a token every `token_s` seconds for each completion, when it is not paused.

    frozen: it does nothing any more. load_s: how long an update takes. refuse: group -> the error
    that handing it over raises. lie: version -> what it says that it serves instead.
    """

    def __init__(self, token_s: float = 0.001, load_s: float = 0.0) -> None:
        self.token_s, self.load_s = token_s, load_s
        self.progress = 0
        self.asked = 0
        self.version = -1
        self.loads: list[int] = []
        self.refuse: dict[str, Exception] = {}
        self.fail_load: dict[int, Exception] = {}
        self.frozen = False
        self.running: dict[str, int] = {}
        self.aborted: list[str] = []
        self.peak = 0
        self._open = asyncio.Event()
        self._open.set()

    async def _work(self) -> None:
        while self.frozen:
            await asyncio.sleep(0.005)
        await self._open.wait()

    async def add(
        self, request_id: str, token_ids: tuple[int, ...], spec: SamplingSpec, greedy: bool = False
    ) -> list[Any]:
        del token_ids, greedy
        await self._work_while_paused()
        if request_id in self.refuse:
            raise self.refuse[request_id]
        names = [f"{request_id}/{index}" for index in range(spec.n)]
        for name in names:
            self.running[name] = spec.max_tokens
        self.peak = max(self.peak, len(self.running))
        return names

    async def _work_while_paused(self) -> None:
        while self.frozen:
            await asyncio.sleep(0.005)

    async def finish(self, queue: Any, seed: int) -> RawCompletion:
        count = self.running[queue]
        for _ in range(count):
            await asyncio.sleep(self.token_s)
            await self._work()
            self.progress += 1
        del self.running[queue]
        ids = np.arange(count, dtype=np.int64) + seed
        return RawCompletion(ids, np.zeros(count, np.float32), "length", seed)

    async def abort(self, request_id: str, count: int) -> None:
        for name in [f"{request_id}/{index}" for index in range(count)]:
            if self.running.pop(name, None) is not None:
                self.aborted.append(name)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def update_weights(self, path: str, names: list[str], digest: str, version: int) -> None:
        del path, names, digest
        async with self.paused():
            await asyncio.sleep(self.load_s)
            await self._work_while_paused()
            if version in self.fail_load:
                raise self.fail_load[version]
            self.version = version
            self.loads.append(version)

    async def prove(self, path: str, version: int) -> None:
        del path
        assert self.version == version

    async def score(self, token_ids: list[int], request_id: str) -> list[float]:
        del token_ids, request_id
        return list(LEARNER)


class Method:
    """Looks like a Ray actor's method: `.remote()` gives something to await."""

    def __init__(self, call: Callable[..., Any], returns: int = 1) -> None:
        self._call, self._returns = call, returns

    def options(self, num_returns: int) -> Method:
        return Method(self._call, num_returns)

    def remote(self, *arguments: Any) -> Any:
        answer = asyncio.ensure_future(self._call(*arguments))
        if self._returns == 1:
            return answer

        async def first() -> Any:
            return (await answer)[0]

        return asyncio.ensure_future(first()), f"ref:{arguments[0]}"


class Handle:
    """A RolloutActor as Ray would show it. It can be killed, and stopped as by SIGSTOP."""

    METHODS = ("place", "start", "sync", "submit", "completion", "collect", "forget", "memory")

    def __init__(self, name: str, engine: StandInEngine | None = None, start_s: float = 0) -> None:
        self.engine = engine or StandInEngine()
        self.actor = RolloutActor(name, None, "/tmp", self.engine, Tokenizer())  # type: ignore[arg-type]
        self.start_s = start_s
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.dead = asyncio.Event()
        self.stopped = False
        for method in self.METHODS:
            setattr(self, method, Method(self._calling(method)))

    def _calling(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            self.calls.append((method, arguments))
            if self.dead.is_set():
                raise ActorDiedError()
            while self.stopped and not self.dead.is_set():
                await asyncio.sleep(0.005)
            if method == "start":
                await asyncio.sleep(self.start_s)
            work = asyncio.ensure_future(getattr(self.actor, method)(*arguments))
            death = asyncio.ensure_future(self.dead.wait())
            try:
                await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
                if death.done():
                    raise ActorDiedError()
                while self.stopped and not self.dead.is_set():
                    await asyncio.sleep(0.005)
                return work.result()
            finally:
                work.cancel()
                death.cancel()

        return call

    def kill(self) -> None:
        self.dead.set()


def place_of(cores: tuple[int, ...] = (0, 1, 2, 3)) -> Place:
    return Place("local", cores, 1)


__all__ = [
    "LEARNER",
    "PROBE",
    "Failure",
    "Handle",
    "Method",
    "StandInEngine",
    "Tokenizer",
    "info",
    "place_of",
    "request",
]
