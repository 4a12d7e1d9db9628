"""Reward workers whose functions run in this process, and rewards that the stand-ins can earn."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from cohort.actors.records import Place
from cohort.rewards.adapters import load_reward
from cohort.rewards.base import is_per_completion, per_completion, score_group
from cohort.rewards.result_json import from_json, to_json
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker
from tests.harness.local_ray import current_actor, current_ray

SCORE_S = 0.02


@per_completion
def residues(completion_ids: Any, **_: Any) -> list[float]:
    """Mean of the token ids modulo 7: every group has signal, and every token counts."""
    return [sum(token % 7 for token in ids) / max(len(ids), 1) for ids in completion_ids]


@per_completion
def often_equal(completion_ids: Any, answer: Any, **_: Any) -> list[float]:
    """As `residues` where the answer is even; no signal where it is odd."""
    scores = residues(completion_ids)
    return [0.0 if right % 2 else score for score, right in zip(scores, answer, strict=True)]


def _refuse(work: Coroutine[Any, Any, Any]) -> Any:
    work.close()
    raise NotImplementedError("no async reward functions here: the loop is the driver's")


class LocalRewardWorker(RewardWorker):
    """The product's RewardWorker with its functions in this process instead of a child."""

    kind = "reward"
    serial = True

    def __init__(
        self, specs: Sequence[RewardSpec], timeout_s: float, *_: Any, max_steps: int = 0, **__: Any
    ) -> None:
        _load_here(self, specs)
        self._timeout_s = timeout_s
        self._max_steps = max_steps
        self._doing, self._since = "", 0.0

    def _call(self, index: int, group: Any, payload: bytes, timeout_s: float) -> Any:  # noqa: ARG002
        function, name, columns = self._loaded[index]
        result = score_group(function, name, group, _refuse, columns, self._max_steps)
        return from_json(name, to_json(result), len(group.completions)), SCORE_S

    def place(self) -> Place:
        # All actors are in one process here: a number of its own tells whom to look at.
        return replace(super().place(), pid=current_ray().pid_of(current_actor()))

    async def score_part(self, *parts: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(SCORE_S * current_ray().slowness(current_actor().name))
        return RewardWorker.score_part(self, *parts)

    async def score(self, group: Any, *scored_parts: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(SCORE_S * current_ray().slowness(current_actor().name))
        return RewardWorker.score(self, group, *scored_parts)


class LoadedHere(RewardWorker):
    """What `prepare` makes to see whether the functions can be loaded, without a child process."""

    def __init__(self, specs: Sequence[RewardSpec], *_: Any, **__: Any) -> None:
        _load_here(self, specs)


def _load_here(actor: Any, specs: Sequence[RewardSpec]) -> None:
    actor._specs = tuple(specs)
    actor._child = actor._watcher = None
    actor._loaded = [
        (load_reward(spec.path, spec.kind, spec.options), spec.name, spec.columns) for spec in specs
    ]
    actor._streams = tuple(
        is_per_completion(function) if spec.whole_group is None else not spec.whole_group
        for spec, (function, _, _) in zip(specs, actor._loaded, strict=True)
    )
