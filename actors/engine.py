"""The only file that imports vllm: one adapter around AsyncLLM.

Token ids in, token ids and processed log-probs out. Every sampling field is explicit; nothing is
taken from the model folder's generation defaults. Weights come through vLLM's own weight-transfer
API. vllm is imported inside functions: importing this module costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cohort.actors.config import ActorsConfig
from cohort.actors.process import KEEP_HEAP
from cohort.actors.proof import Held, Proof, ServedLayout, file_digests
from cohort.actors.records import SamplingSpec
from cohort.actors.spans import Span, Spans
from cohort.actors.turns import FinishReason

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

T = TypeVar("T")
GIB = 1024**3
# Shared-prefix blocks; multiples of 32 keep vLLM's fast CPU attention path. The CPU default of 128
# would compute a short prompt once per completion instead of once per group.
CPU_BLOCK_TOKENS = 32
CPU_BATCH_TOKENS = 4096
LIVENESS_S = 0.5


@dataclass(frozen=True)
class EngineSpec:
    """How to build one engine.

    Attributes:
        cores: CPU cores that it is bound to (CPU only).
    """

    model_path: str
    dtype: str
    device: str
    max_length: int
    actors: ActorsConfig
    seed: int
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawCompletion:
    """What the engine returned for one completion: T token ids and their T log-probs.

    Attributes:
        token_ids: [T] int64.
        logprobs: [T] float32, nats.
        spans: Which weights they came from, in order; empty where they did not come from an engine.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    seed: int
    spans: tuple[Span, ...] = ()


class EngineError(Exception):
    """The engine refused or failed."""


class WeightsNotServed(Exception):
    """The engine does not serve the weights that it was told to load."""


def stop_token_ids(model_path: str, tokenizer_eos: int | None) -> list[int]:
    """Every end-of-sequence id that the tokenizer, config.json or generation_config.json names."""
    found: list[int] = [] if tokenizer_eos is None else [tokenizer_eos]
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted(set(found))


class Engine:
    """One vLLM engine. Start it with `await Engine.start(spec)`."""

    def __init__(self, llm: AsyncLLM, spec: EngineSpec, stop_ids: list[int]) -> None:
        self._llm = llm
        self._spec = spec
        self._stop_ids = stop_ids
        self.progress = 0
        # Calls that vLLM's process has not answered: it has something to do while there are any.
        self.asked = 0
        self._spans = Spans()
        self._proof: Proof | None = None
        self._published: asyncio.Future[dict[str, int]] | None = None
        self._count_tokens()
        self._death = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(cls, spec: EngineSpec, stop_ids: list[int]) -> Engine:
        """Start the engine's processes and load the model. Takes 10-30 s.

        Raises whatever vLLM raises; the reason is in the child's output.
        """
        # Read by vLLM in this process and in the children it spawns.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        actors = spec.actors
        options: dict[str, object] = {}
        if spec.device == "cpu" and not actors.compile:
            # vLLM compiles a small sampling function even in eager mode: seconds at the first
            # tokens of every engine, for microseconds afterwards.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        if spec.device == "cpu":
            # A weight update allocates and frees a whole model.
            os.environ["GLIBC_TUNABLES"] = KEEP_HEAP
            # On CPUs vLLM runs the model in a process of its own behind the engine's, only to give
            # it OpenMP's variables. The engine's has them from here: a third less time to start.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            options = {
                "kv_cache_memory_bytes": int(actors.kv_cache_gib * GIB),
                "block_size": CPU_BLOCK_TOKENS,
                # A prompt cut into chunks rewinds its seeded generator, which torch's CPU
                # generator cannot do: vLLM's engine would die. So prompts are never cut.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(spec.max_length, CPU_BATCH_TOKENS),
            }
        else:
            options = {"gpu_memory_utilization": actors.gpu_memory}
        if actors.quantization == "fp8":
            options["quantization"] = "fp8_per_tensor"
            if spec.device == "cpu":
                from cohort.actors import float8

                options["quantization"] = float8.EMULATED

        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from cohort.actors import shared_memory

        arguments = AsyncEngineArgs(
            model=spec.model_path,
            dtype=spec.dtype,
            max_model_len=spec.max_length,
            max_num_seqs=actors.max_concurrent,
            tensor_parallel_size=actors.tensor_parallel,
            enforce_eager=not actors.compile,
            seed=spec.seed % 2**31,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            disable_log_stats=True,
            worker_extension_cls="cohort.actors.shared_memory.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=shared_memory.BACKEND),
            **options,
        )
        if spec.device == "cpu":
            # For the engine's process alone, so after this one has loaded its own OpenMP: that
            # would bind this thread to the first core, the child would inherit it, take itself for
            # a machine of one core and put its threads to sleep between any two operations.
            os.environ["OMP_NUM_THREADS"] = str(len(spec.cores))
            os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, spec.cores))
        llm = AsyncLLM.from_engine_args(arguments)
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        return cls(llm, spec, stop_ids)

    async def _answer(self, call: Awaitable[T]) -> T:
        """What vLLM answers. Its own calls hang when the engine dies meanwhile.

        Raises EngineError soon after the engine's process has died.
        """
        task = asyncio.ensure_future(call)
        self.asked += 1
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EngineError("vLLM's engine process has died")
        finally:
            self.asked -= 1
            task.cancel()

    async def _watch(self) -> None:
        """Ends when the engine's process has died."""
        while not self._llm.errored:
            await asyncio.sleep(LIVENESS_S)

    def _count_tokens(self) -> None:
        """Keep `progress` at the number of tokens that came from vLLM's engine process.

        Requests answer when they are done; in between, only vLLM's own loop sees that it works.
        """
        core = self._llm.engine_core
        next_outputs = core.get_output_async

        async def counted() -> EngineCoreOutputs:
            outputs = await next_outputs()
            for output in outputs.outputs:
                self.progress += len(output.new_token_ids)
                self._spans.made(output.request_id, len(output.new_token_ids))
            return outputs

        core.get_output_async = counted

    def _sampling(self, spec: SamplingSpec, seed: int, greedy: bool) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1,
            temperature=0.0 if greedy else spec.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=None if greedy else seed,
            max_tokens=spec.max_tokens,
            min_tokens=0,
            stop_token_ids=self._stop_ids,
            # The end token counts as an action; text is decoded elsewhere, but to find its end.
            ignore_eos=True,
            stop=list(spec.stop),
            detokenize=bool(spec.stop),
            skip_special_tokens=False,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def add(
        self, request_id: str, token_ids: tuple[int, ...], spec: SamplingSpec, greedy: bool = False
    ) -> list[RequestOutputCollector]:
        """Hand one group to the scheduler; returns what `finish` waits on, one a completion.

        Every completion is a request of its own, with the seed spec.seed + its index: vLLM's own
        requests for n of them answer when the last is done. The prompt is computed once all the
        same, in the prefix cache. Raises ValueError when the request itself is wrong (a prompt
        beyond the context).
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        added: list[RequestOutputCollector] = []
        try:
            for index in range(spec.n):
                queue = await self._answer(
                    self._llm.add_request(
                        f"{request_id}/{index}",
                        tokens_input(list(token_ids)),
                        self._sampling(spec, spec.seed + index, greedy),
                    )
                )
                self._spans.begin(queue.request_id)
                added.append(queue)
        except BaseException as error:
            if added:
                await self.abort(request_id, len(added))
            if isinstance(error, VLLMClientError):
                raise ValueError(f"{request_id}: {error}") from error
            raise
        return added

    async def finish(self, queue: RequestOutputCollector, seed: int) -> RawCompletion:
        """Wait until a completion is done."""
        name = queue.request_id
        try:
            item = (await self._answer(_finished(queue))).outputs[0]
            return _raw_completion(item, seed, self._spans.end(name, len(item.token_ids)))
        finally:
            self._spans.forget(name)

    async def abort(self, request_id: str, count: int) -> None:
        """End the first `count` completions of a group that nobody waits for any more."""
        await self._answer(self._llm.abort([f"{request_id}/{index}" for index in range(count)]))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Freeze scheduling; requests in flight stay and go on afterwards, also after an error."""
        await self._answer(self._llm.pause_generation(mode="keep", clear_cache=False))
        try:
            yield
        finally:
            await self._answer(self._llm.resume_generation())

    async def update_weights(self, path: str, names: list[str], digest: str, version: int) -> None:
        """Load a published file; requests in flight go on with the new weights.

        Raises EngineError when the prefix cache could not be cleared: old keys and values would
        silently be mixed with the new weights.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._published is not None:
            self._published.cancel()
        # The file's digests are computed while the engine loads it.
        turned = self._proof.transposed if self._proof is not None else ()
        self._published = asyncio.ensure_future(asyncio.to_thread(file_digests, path, turned))
        async with self.paused():
            update = WeightTransferUpdateRequest(
                update_info={"path": path, "names": names, "fingerprint": digest}
            )
            await self._answer(self._llm.start_weight_update())
            # What was generated before the pause has arrived by now.
            self._spans.update(version)
            await self._answer(self._llm.update_weights(update))
            await self._answer(self._llm.finish_weight_update(str(version)))
            if not await self._answer(self._llm.reset_prefix_cache(reset_running_requests=True)):
                raise EngineError("vLLM could not reset its prefix cache after the weight update")

    async def prove(self, path: str, version: int) -> None:
        """Raise WeightsNotServed unless the engine serves this version, which it loaded last.

        What the engine's layers compute with is read back and compared with the file.
        """
        held = await self._answer(self._llm.get_weight_version())
        if held != str(version):
            raise WeightsNotServed(
                f"the engine says that it serves weights {held}, it was told to load {version}"
            )
        assert self._published is not None, "the update comes first"
        published = await self._published
        workers: list[Held] = await self._call("served_weights")
        if self._proof is None:
            layouts: list[ServedLayout] = await self._call("served_layout")
            if not layouts[0]["layers"]:
                raise WeightsNotServed(f"the engine has loaded nothing of weights {version}")
            self._proof = Proof(
                [one["layers"] for one in layouts], workers, published, layouts[0]["tied"]
            )
            if self._proof.transposed:
                published = await asyncio.to_thread(file_digests, path, self._proof.transposed)
        wrong = self._proof.wrong(workers, published)
        if wrong is not None:
            raise WeightsNotServed(
                f"after weights {version} the engine does not serve what was published: {wrong}"
            )

    async def _call(self, method: str) -> list[Any]:
        """What every worker of the engine answers; see `shared_memory.WorkerExtension`."""
        answers: list[Any] = await self._answer(self._llm.collective_rpc(method))
        return answers

    async def score(self, token_ids: list[int], request_id: str) -> list[float]:
        """Log-probabilities of tokens 1..n-1 of a sequence at temperature 1, under the weights.

        Prompt log-probs never read the prefix cache, so this sees the weights themselves.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        queue = await self._answer(self._llm.add_request(request_id, prompt, parameters))
        output = await self._answer(_finished(queue))
        scored = output.prompt_logprobs[1:]
        return [entry[token].logprob for entry, token in zip(scored, token_ids[1:], strict=True)]


async def _finished(queue: RequestOutputCollector) -> RequestOutput:
    output = await queue.get()
    while not output.finished:
        output = await queue.get()
    return output


def _raw_completion(item: CompletionOutput, seed: int, spans: tuple[Span, ...]) -> RawCompletion:
    token_ids = np.asarray(item.token_ids, dtype=np.int64)
    logprobs = np.fromiter(
        (entry[token].logprob for entry, token in zip(item.logprobs, item.token_ids, strict=True)),
        dtype=np.float32,
        count=len(token_ids),
    )
    if item.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with '{item.finish_reason}'")
    return RawCompletion(token_ids, logprobs, item.finish_reason, seed, spans)
