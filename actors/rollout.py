"""RolloutActor: a Ray actor around one engine."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.actors.engine import (
    Engine,
    EngineError,
    EngineSpec,
    RawCompletion,
    WeightsNotServed,
    stop_token_ids,
)
from cohort.actors.machine import usable_cores
from cohort.actors.play import Player
from cohort.actors.process import (
    SHM,
    last_lines,
    mapped_shared_memory,
    peak_rss,
    reap_also,
    redirect_output,
    start_reaper,
)
from cohort.actors.records import (
    UNSYNCED,
    Completion,
    EpisodeHost,
    Failure,
    Group,
    GroupMeta,
    NotSynced,
    Place,
    Request,
    SamplingSpec,
    WeightsInfo,
)
from cohort.actors.spans import ends_of
from cohort.actors.text import Tokenizer, completion_text
from cohort.actors.turns import FailureKind
from cohort.actors.weight_file import write_new
from cohort.actors.witness import look_at, node_id

if TYPE_CHECKING:
    import numpy as np
    import psutil
    from vllm.v1.engine.output_processor import RequestOutputCollector


class NoWeights(Exception):
    """The engine has lost its weights while a turn waited for it."""


# Mistakes in a program: another actor would make them too.
MISTAKES = (AttributeError, ImportError, NameError, NotImplementedError, WeightsNotServed)


@dataclass
class _Pending:
    """A group that is being generated."""

    request: Request
    completions: list[asyncio.Task[Completion]]
    started: float = field(default_factory=lambda: time.monotonic())


class RolloutActor:
    """Generates groups. Answers with values, or with a Failure that says whose fault it is.

    A new actor refuses to generate until it has pulled published weights: the weights it loaded
    from disk may be older than the run.
    """

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        log_dir: str,
        engine: Engine | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """engine, tokenizer: for tests, ones that exist already (or stand-ins); `start` makes them
        otherwise."""
        self.name = name
        self._spec = spec
        self._log = Path(log_dir) / f"{name}.log"
        # A name that nobody can guess: nothing can have been put there beforehand.
        self._shm = SHM / f"cohort-{name}-{os.getpid()}-{secrets.token_hex(8)}"
        self._engine = engine
        self._tokenizer = tokenizer
        self._stops: list[int] = []
        self._version = UNSYNCED
        # Of the last update that worked: older ones are refused, whatever came in between.
        self._newest = UNSYNCED
        self._pending: dict[str, _Pending] = {}
        self._refused: dict[str, Failure] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        # Updates and hand-overs of groups, one at a time and in order.
        self._gate = asyncio.Condition()
        self._stages = 0
        self._probes = 0
        self._children: list[psutil.Process] = []

    async def place(self) -> Place:
        """Where this actor runs, and how far it is: asked again and again while it works."""
        engine = self._engine
        return Place(
            node_id=node_id(),
            cores=usable_cores(),
            pid=os.getpid(),
            progress=self._stages + (0 if engine is None else engine.progress),
            working=engine is not None and engine.asked > 0,
            look=look_at([child.pid for child in self._children]),
        )

    async def start(self, cores: tuple[int, ...], serve_loaded: bool = False) -> float | Failure:
        """Start the engine on these cores; seconds it took, or why it failed.

        serve_loaded: generate from the weights on disk without a first sync (evaluation).
        """
        began = time.monotonic()
        if self._engine is not None:
            self._serve_loaded(serve_loaded)
            return time.monotonic() - began
        start_reaper(self._shm)
        redirect_output(self._log)
        log_start = self._log.stat().st_size
        try:
            from transformers import AutoTokenizer

            path = self._spec.model_path
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._stops = stop_token_ids(path, self._tokenizer.eos_token_id)
            self._engine = await Engine.start(replace(self._spec, cores=cores), self._stops)
        except Exception as error:  # noqa: BLE001 - process boundary: the error becomes a value
            detail = last_lines(self._log, start=log_start)
            return Failure(
                "infra",
                f"{self.name} could not start its engine",
                f"{type(error).__name__}: {error}\nlast lines of {self._log}:\n{detail}",
            )
        # vLLM's processes talk through shared memory that they cannot remove when they are killed.
        self._children = self._processes()[1:]
        reap_also(mapped_shared_memory([os.getpid(), *(child.pid for child in self._children)]))
        self._serve_loaded(serve_loaded)
        return time.monotonic() - began

    def _serve_loaded(self, wanted: bool) -> None:
        if wanted:
            self._version = self._newest = 0

    async def sync(self, info: WeightsInfo, probe: list[int]) -> list[float] | Failure:
        """Pull a published version, prove that it is served, then score the probe under it.

        Returns the engine's log-probs of probe tokens 1..n-1. Older versions than the engine
        already held are refused. After a failure the actor refuses to generate until a sync
        succeeds.
        """
        try:
            path = await self._local_copy(info)
            engine = self._running()
            async with self._gate:
                # In here, so that of two updates the older can never come last.
                if info.version < self._newest:
                    return Failure(
                        "data",
                        f"{self.name} refused weights",
                        f"version {info.version} is older than {self._newest}, which it holds",
                    )
                try:
                    await self._load(engine, path, info)
                finally:
                    self._gate.notify_all()
            self._probes += 1
            return await engine.score(probe, f"probe-{self._probes}")
        except Exception as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} could not load weights {info.version}", error)

    async def _load(self, engine: Engine, path: str, info: WeightsInfo) -> None:
        self._stages += 1
        self._version = UNSYNCED
        await engine.update_weights(path, list(info.names), info.fingerprint, info.version)
        self._stages += 1
        await engine.prove(path, info.version)
        self._version = self._newest = info.version
        self._stages += 1

    async def _local_copy(self, info: WeightsInfo) -> str:
        """The file itself on the learner's node; elsewhere a copy of its bytes."""
        if node_id() == info.node_id:
            return info.path
        if info.remote is None:
            raise EngineError(f"weights {info.version} were not published to other nodes")
        data = await info.remote
        if not self._shm.exists():
            self._shm.mkdir(mode=0o700)
        target = self._shm / f"v{info.version}-{secrets.token_hex(4)}.safetensors"
        write_new(target, data.data)
        for other in self._shm.iterdir():
            if other != target:
                other.unlink()
        return str(target)

    async def submit(self, requests: list[Request]) -> Failure | None:
        """Hand groups to the engine all at once, so that the same groups in the same order are
        batched the same way in every run. Waits for an update that is being loaded, and for one
        that is to come when a group asks for newer weights.

        A group that the engine refuses fails alone, in `collect`; where it refuses all of them, its
        first refusal is the answer here. NotSynced: there are no weights to generate with.
        """
        new: list[str] = []
        oldest = max((request.oldest for request in requests), default=0)
        async with self._gate:
            await self._gate.wait_for(lambda: self._version == UNSYNCED or self._version >= oldest)
            if self._version == UNSYNCED:
                return NotSynced(
                    "infra", f"{self.name} refused to generate", "it has not pulled weights yet"
                )
            try:
                engine = self._running()
                async with engine.paused():
                    for request in requests:
                        # Asked again after a lost answer: the group is already being generated.
                        if request.group_id not in self._pending:
                            await self._admit(engine, request)
                            new.append(request.group_id)
            except Exception as error:  # noqa: BLE001 - process boundary
                for name in new:
                    self._drop(name)
                return self._failure(f"{self.name} could not take {len(requests)} groups", error)
        if all(request.group_id in self._refused for request in requests):
            refusals = [self._refused.pop(request.group_id) for request in requests]
            return refusals[0] if refusals else None
        return None

    async def _admit(self, engine: Engine, request: Request) -> None:
        """Hand one group to the engine, or keep its refusal for whoever collects it."""
        if request.host is not None:
            self._pending[request.group_id] = _Pending(
                request,
                [
                    asyncio.create_task(self._play(request, index, request.host))
                    for index in range(request.sampling.n)
                ],
            )
            return
        try:
            queues = await engine.add(
                request.group_id, request.prompt.token_ids, request.sampling, request.greedy
            )
        except Exception as error:
            refusal = self._failure(f"{self.name} refused group {request.group_id}", error)
            if refusal.kind != "data":
                raise
            self._refused[request.group_id] = refusal
            return
        completions = [
            asyncio.create_task(self._complete(request, index, queue, self._version))
            for index, queue in enumerate(queues)
        ]
        self._pending[request.group_id] = _Pending(request, completions)

    def _drop(self, group_id: str) -> None:
        """Forget a group; what of it is still being generated ends."""
        self._refused.pop(group_id, None)
        pending = self._pending.pop(group_id, None)
        if pending is None:
            return
        unfinished = [task for task in pending.completions if not task.done() or task.cancelled()]
        for task in unfinished:
            task.cancel()
        # Turns of episodes are aborted where they are waited for.
        if unfinished and self._engine is not None and pending.request.host is None:
            self._later(self._abort(self._engine, group_id, len(pending.completions)))

    def _later(self, abort: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(abort)
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, engine: Engine, request_id: str, count: int) -> None:
        # An engine that has died generates nothing either.
        with suppress(EngineError):
            await engine.abort(request_id, count)

    async def forget(self, group_id: str) -> None:
        """Stop generating a group that nobody waits for any more."""
        self._drop(group_id)

    async def _complete(
        self, request: Request, index: int, queue: RequestOutputCollector, version: int
    ) -> Completion:
        made = await self._running().finish(queue, request.sampling.seed + index)
        return Completion(
            id=f"{request.group_id}/{index}",
            prompt_id=request.prompt.id,
            token_ids=made.token_ids,
            logprobs=made.logprobs,
            finish_reason=made.finish_reason,
            seed=made.seed,
            weight_versions=ends_of(made.spans, version),
            text=self._text(made.token_ids),
            spans=made.spans,
        )

    async def _play(self, request: Request, index: int, host: EpisodeHost) -> Completion:
        """One episode of a group; each of its turns is a request of its own."""
        length, version = self._spec.max_length, self._version
        return await Player(request, index, host, self._sample, self._text, length, version).play()

    def _text(self, token_ids: np.ndarray) -> str:
        assert self._tokenizer is not None, "made together with the engine"
        return completion_text(self._tokenizer, token_ids, self._stops)

    async def _sample(
        self, request_id: str, token_ids: Sequence[int], spec: SamplingSpec, greedy: bool
    ) -> tuple[RawCompletion, tuple[int, int]]:
        """One turn, with the weight versions that it began and ended with."""
        engine = self._running()
        # Not while weights are being loaded.
        async with self._gate:
            if self._version == UNSYNCED:
                raise NoWeights
            version = self._version
            (queue,) = await engine.add(request_id, tuple(token_ids), spec, greedy)
        try:
            made = await engine.finish(queue, spec.seed)
        except asyncio.CancelledError:
            self._later(self._abort(engine, request_id, 1))
            raise
        return made, ends_of(made.spans, version)

    async def completion(self, group_id: str, index: int) -> tuple[Failure | None, Group | None]:
        """Wait for one completion of a submitted group, before the others are done.

        Returns it as a group of one. To be called before `collect` forgets the group.
        """
        pending = self._pending.get(group_id)
        if pending is None:
            return self._refused.get(group_id, self._lost(group_id)), None
        try:
            # Shielded: the group outlives a caller that stops waiting.
            done = await asyncio.shield(pending.completions[index])
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} failed on {group_id}/{index}", error), None
        return None, Group(group_id, pending.request.prompt, (done,))

    async def collect(self, group_id: str) -> tuple[GroupMeta | Failure, Group | None]:
        """Wait for one submitted group. Nothing of it is left behind, however this ends."""
        pending = self._pending.get(group_id)
        if pending is None:
            return self._refused.pop(group_id, self._lost(group_id)), None
        try:
            done = tuple(await asyncio.gather(*pending.completions))
        except NoWeights:
            return NotSynced("infra", f"{self.name} stopped group {group_id}", "no weights"), None
        except Exception as error:  # noqa: BLE001 - process boundary
            return self._failure(f"{self.name} failed on group {group_id}", error), None
        finally:
            self._drop(group_id)
        group = Group(group_id, pending.request.prompt, done)
        return GroupMeta.of(group, self.name, time.monotonic() - pending.started), group

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
        kind: FailureKind = "infra"
        if isinstance(error, MISTAKES):
            kind = "bug"
        elif isinstance(error, ValueError | TypeError):
            kind = "data"
        return Failure(kind, what, f"{text}\nlast lines of {self._log}:\n{detail}")

    async def memory(self) -> int:
        """Peak resident bytes of this actor and of its engine's processes, summed."""
        return sum(peak_rss(process.pid) for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        import psutil

        return [psutil.Process(), *psutil.Process().children(recursive=True)]
