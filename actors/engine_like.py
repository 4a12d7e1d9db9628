"""What a rollout actor needs of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from cohort.actors.engine import RawCompletion
from cohort.actors.records import SamplingSpec


class EngineLike(Protocol):
    """What an actor needs of its engine: `cohort.actors.engine.Engine`, or a stand-in in tests.

    progress: tokens that it has produced.
    """

    progress: int

    async def add(
        self, request_id: str, token_ids: tuple[int, ...], spec: SamplingSpec, greedy: bool = False
    ) -> Sequence[object]: ...

    async def finish(self, queue: Any, seed: int) -> RawCompletion: ...

    async def abort(self, request_id: str, count: int) -> None: ...

    def paused(self) -> AbstractAsyncContextManager[None]: ...

    async def update_weights(
        self, path: str, names: list[str], digest: str, version: int
    ) -> None: ...

    async def prove(self, path: str, version: int) -> None: ...

    async def score(self, token_ids: list[int], request_id: str) -> list[float]: ...
