"""RolloutActor: a Ray actor around one engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors.engine import Engine, EngineError, EngineSpec, stop_token_ids
from actors.process import (
    last_lines,
    mapped_shared_memory,
    reap_also,
    redirect_output,
    start_reaper,
)
from actors.records import (
    Completion,
    Failure,
    Group,
    GroupMeta,
    Prompt,
    SamplingSpec,
    WeightsInfo,
)

UNSYNCED = -1


@dataclass(frozen=True)
class Request:
    """One group to generate. greedy: for evaluation, temperature 0 and no seed."""

    group_id: str
    prompt: Prompt
    sampling: SamplingSpec
    greedy: bool = False


@dataclass(frozen=True)
class Place:
    """Where an actor runs: its node, the cores it may use, its process."""

    node_id: str
    cores: tuple[int, ...]
    pid: int


@dataclass
class _Pending:
    """A group that is being generated. version: of the weights it began with."""

    request: Request
    completions: list[asyncio.Task[Completion]]
    version: int
    started: float = field(default_factory=time.monotonic)


class RolloutActor:
    """Generates groups. Answers with values, or with a Failure that says whose fault it is.

    A new actor refuses to generate until it has pulled published weights: the weights it loaded
    from disk may be older than the run.
    """

    def __init__(self, name: str, spec: EngineSpec, log_dir: str) -> None:
        self.name = name
        self._spec = spec
        self._log = Path(log_dir) / f"{name}.log"
        self._shm = Path(f"/dev/shm/cohort-{name}-{os.getpid()}")
        self._engine: Engine | None = None
        self._tokenizer: Any = None
        self._version = UNSYNCED
        self._pending: dict[str, _Pending] = {}
        self._gate = asyncio.Lock()
        self._probes = 0

    async def place(self) -> Place:
        import ray

        return Place(
            node_id=ray.get_runtime_context().get_node_id(),
            cores=tuple(sorted(os.sched_getaffinity(0))),
            pid=os.getpid(),
        )

    async def start(self, cores: tuple[int, ...], serve_loaded: bool = False) -> float | Failure:
        """Start the engine on these cores; seconds it took, or why it failed.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        """
        began = time.monotonic()
        start_reaper(self._shm)
        redirect_output(self._log)
        log_start = self._log.stat().st_size
        try:
            from transformers import AutoTokenizer

            path = self._spec.model_path
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            stops = stop_token_ids(path, self._tokenizer.eos_token_id)
            self._engine = await Engine.start(replace(self._spec, cores=cores), stops)
        except Exception as error:  # noqa: BLE001 - process boundary: the error becomes a value
            detail = last_lines(self._log, start=log_start)
            return Failure(
                "infra",
                f"{self.name} could not start its engine",
                f"{type(error).__name__}: {error}\nlast lines of {self._log}:\n{detail}",
            )
        # vLLM's processes talk through shared memory that they cannot remove when they are killed.
        reap_also(mapped_shared_memory(process.pid for process in self._processes()))
        if serve_loaded:
            self._version = 0
        return time.monotonic() - began

    async def sync(self, info: WeightsInfo, probe: list[int]) -> list[float] | Failure:
        """Pull a published version, then score the probe sequence under it.

        Returns the engine's log-probs of probe tokens 1..n-1. Older versions than the engine
        already holds are refused. After a failure the actor refuses to generate until a sync
        succeeds.
        """
        if info.version < self._version:
            return Failure(
                "data",
                f"{self.name} refused weights",
                f"version {info.version} is older than {self._version}, which it holds",
            )
        try:
            path = await self._local_copy(info)
            engine = self._running()
            async with self._gate:
                self._version = UNSYNCED
                await engine.update_weights(path, list(info.names), info.fingerprint, info.version)
                self._version = info.version
            self._probes += 1
            return await engine.score(probe, f"probe-{self._probes}")
        except Exception as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} could not load weights {info.version}", error)

    async def _local_copy(self, info: WeightsInfo) -> str:
        """The file itself on the learner's node; elsewhere a copy of its bytes."""
        if (await self.place()).node_id == info.node_id:
            return info.path
        if info.remote is None:
            raise EngineError(f"weights {info.version} were not published to other nodes")
        self._shm.mkdir(parents=True, exist_ok=True)
        target = self._shm / f"v{info.version}.safetensors"
        target.write_bytes(memoryview(await info.remote))
        for other in self._shm.iterdir():
            if other != target:
                other.unlink()
        return str(target)

    async def submit(self, requests: list[Request]) -> Failure | None:
        """Hand groups to the engine all at once, so that the same groups in the same order are
        batched the same way in every run."""
        if self._version == UNSYNCED:
            return Failure(
                "infra", f"{self.name} refused to generate", "it has not pulled weights yet"
            )
        try:
            engine = self._running()
            async with self._gate, engine.paused():
                for request in requests:
                    # Asked again after a lost answer: the group is already being generated.
                    if request.group_id in self._pending:
                        continue
                    queues = await engine.add(
                        request.group_id,
                        request.prompt.token_ids,
                        request.sampling,
                        request.greedy,
                    )
                    completions = [
                        asyncio.create_task(self._complete(request, index, queue, self._version))
                        for index, queue in enumerate(queues)
                    ]
                    self._pending[request.group_id] = _Pending(request, completions, self._version)
        except Exception as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} could not take {len(requests)} groups", error)
        return None

    async def _complete(self, request: Request, index: int, queue: Any, version: int) -> Completion:
        sample = await self._running().finish(queue, request.sampling.seed + index)
        return Completion(
            id=f"{request.group_id}/{index}",
            prompt_id=request.prompt.id,
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            finish_reason=sample.finish_reason,
            seed=sample.seed,
            weight_versions=(version, max(self._version, version)),
            text=self._tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=True),
        )

    async def completion(self, group_id: str, index: int) -> tuple[Failure | None, Group | None]:
        """Wait for one completion of a submitted group, before the others are done.

        Returns it as a group of one. To be called before `collect` forgets the group.
        """
        pending = self._pending.get(group_id)
        if pending is None:
            return self._lost(group_id), None
        try:
            # Shielded: the group outlives a caller that stops waiting.
            done = await asyncio.shield(pending.completions[index])
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} failed on {group_id}/{index}", error), None
        return None, Group(group_id, pending.request.prompt, (done,))

    async def collect(self, group_id: str) -> tuple[GroupMeta | Failure, Group | None]:
        """Wait for one submitted group."""
        pending = self._pending.get(group_id)
        if pending is None:
            return self._lost(group_id), None
        try:
            done = tuple(await asyncio.gather(*pending.completions))
        except Exception as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} failed on group {group_id}", error), None
        finally:
            for task in pending.completions:
                task.cancel()
            self._pending.pop(group_id, None)
        prompt = pending.request.prompt
        meta = GroupMeta(
            group_id=group_id,
            prompt_tokens=len(prompt.token_ids),
            completion_ids=tuple(c.id for c in done),
            completion_tokens=tuple(len(c.token_ids) for c in done),
            truncated=tuple(c.finish_reason == "length" for c in done),
            weight_versions=(pending.version, max(c.weight_versions[1] for c in done)),
            actor=self.name,
            seconds=time.monotonic() - pending.started,
        )
        return meta, Group(group_id, prompt, done)

    def _lost(self, group_id: str) -> Failure:
        return Failure("infra", f"{self.name} lost group {group_id}", "never submitted")

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineError(f"{self.name} has no engine")
        return self._engine

    def _failure(self, what: str, error: BaseException) -> Failure:
        # A value that the request itself caused fails on every engine; anything else may not.
        detail = last_lines(self._log, count=5)
        text = f"{type(error).__name__}: {error}"
        kind: Literal["infra", "data"] = (
            "data" if isinstance(error, ValueError | TypeError) else "infra"
        )
        return Failure(kind, what, f"{text}\nlast lines of {self._log}:\n{detail}")

    async def memory(self) -> int:
        """Peak resident bytes of this actor and of its engine's processes, summed."""
        return sum(_peak_rss(process.pid) for process in self._processes())

    def _processes(self) -> list[Any]:
        import psutil

        return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def split_cores(cores: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Disjoint, contiguous, near-equal shares of a node's cores.

    With more parts than cores, neighbours share one: every part gets at least one core.

    >>> split_cores((0, 1, 2, 3), 2)
    [(0, 1), (2, 3)]
    """
    if parts >= len(cores):
        return [(cores[index % len(cores)],) for index in range(parts)]
    bounds = [len(cores) * index // parts for index in range(parts + 1)]
    return [cores[start:end] for start, end in itertools.pairwise(bounds)]
