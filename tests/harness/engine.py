"""vLLM in a few lines: what `actors/engine.py` asks of it, with the policy of `policy.py`.

The product's own `RolloutActor` and `Engine` run on it. It keeps vLLM's rules: requests wait while
generation is paused and go on afterwards, an update changes nothing before its file has been
checked, prompts are cached by their tokens until the prefix cache is reset.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from cohort.actors.config import ActorsConfig
from cohort.actors.engine import Engine, EngineSpec
from cohort.actors.proof import digest
from cohort.actors.records import Place
from cohort.actors.rollout import RolloutActor
from tests.harness import policy
from tests.harness.local_ray import current_actor, current_ray

START_S = 20.0
TOKEN_S = 0.05
UPDATE_S = 0.4


@dataclass
class SamplingParams:
    """Of vLLM: the fields that the product sets."""

    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: int | None = None
    # Stated by the product, and what the stand-in does anyway.
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = True
    # Texts that end a reply come from agents only; the worlds here have none.
    stop: list[str] = field(default_factory=list)
    detokenize: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    output_kind: Any = None


@dataclass
class _Request:
    name: str
    prompt: list[int]
    parameters: SamplingParams
    answer: asyncio.Queue[Any]
    rng: np.random.Generator
    state: float | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Answer(asyncio.Queue[Any]):
    """What a request's output comes through."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id


class Core:
    """vLLM's engine process, of which AsyncLLM's own loop takes what each step has made."""

    def __init__(self) -> None:
        self.made: asyncio.Queue[list[tuple[str, list[int]]]] = asyncio.Queue()

    async def get_output_async(self) -> Any:
        tokens = await self.made.get()
        return SimpleNamespace(
            outputs=[SimpleNamespace(request_id=name, new_token_ids=ids) for name, ids in tokens]
        )


class Vllm:
    """An AsyncLLM. faults: switches that tests set by name; see `tests.harness.world`."""

    def __init__(self, weights: policy.Weights, max_concurrent: int) -> None:
        self.weights = weights
        self.errored = False
        self._max_concurrent = max_concurrent
        self._running: dict[str, _Request] = {}
        self._cached: dict[tuple[int, ...], float] = {}
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._work = asyncio.Event()
        self._version = "default"
        self._updating = False
        self._ray, self._actor = current_ray(), current_actor()
        self.engine_core = Core()
        self._scheduler = asyncio.ensure_future(self._schedule())

    async def _schedule(self) -> None:
        while True:
            await self._work.wait()
            await self._resumed.wait()
            await asyncio.sleep(TOKEN_S * self._ray.slowness(self._actor.name))
            if not self._resumed.is_set():
                continue
            batch = list(self._running.values())[: self._max_concurrent]
            for request in batch:
                self._advance(request)
            self.engine_core.made.put_nowait([(r.name, r.tokens[-1:]) for r in batch])
            await self.engine_core.get_output_async()
            if not self._running:
                self._work.clear()

    def _advance(self, request: _Request) -> None:
        if request.parameters.prompt_logprobs is not None:
            scored = policy.score(self.weights, request.prompt)
            entries = [
                {token: SimpleNamespace(logprob=value)}
                for token, value in zip(request.prompt[1:], scored, strict=True)
            ]
            self._finish(request, "stop", prompt_logprobs=[None, *entries])
            return
        if request.state is None:
            key = tuple(request.prompt)
            if key not in self._cached:
                self._cached[key] = policy.state(self.weights, request.prompt)
            request.state = self._cached[key]
        logprobs = policy.distribution(
            self.weights, request.state, request.parameters.temperature or 1.0
        )
        if request.parameters.temperature == 0:
            token = int(logprobs.argmax())
        else:
            token = int(np.exp(logprobs).cumsum().searchsorted(request.rng.random()))
        token = min(token, len(logprobs) - 1)
        request.tokens.append(token)
        request.logprobs.append(float(logprobs[token]))
        if token in request.parameters.stop_token_ids:
            self._finish(request, "stop")
        elif len(request.tokens) >= request.parameters.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: _Request, why: str, prompt_logprobs: Any = None) -> None:
        del self._running[request.name]
        output = SimpleNamespace(
            token_ids=request.tokens,
            logprobs=[
                {token: SimpleNamespace(logprob=value)}
                for token, value in zip(request.tokens, request.logprobs, strict=True)
            ],
            finish_reason=why,
        )
        finished = SimpleNamespace(finished=True, outputs=[output], prompt_logprobs=prompt_logprobs)
        request.answer.put_nowait(finished)

    async def add_request(self, name: str, prompt: Any, parameters: SamplingParams) -> Any:
        if name in self._running:
            raise ValueError(f"request {name} is running already")
        request = _Request(
            name,
            list(prompt["prompt_token_ids"]),
            parameters,
            Answer(name),
            np.random.default_rng(parameters.seed),
        )
        self._running[name] = request
        self._work.set()
        return request.answer

    async def abort(self, names: Any) -> None:
        for name in [names] if isinstance(names, str) else names:
            self._running.pop(name, None)

    async def pause_generation(self, **_: Any) -> None:
        self._resumed.clear()

    async def resume_generation(self) -> None:
        self._resumed.set()

    async def start_weight_update(self) -> None:
        if self._updating:
            raise RuntimeError("a weight update is going on already")
        self._updating = True

    async def update_weights(self, request: Any) -> None:
        info = request.update_info
        await asyncio.sleep(UPDATE_S * self._ray.slowness(self._actor.name))
        event = self._ray.emit("update", self._actor.name, info["path"], engine=self)
        data = Path(info["path"]).read_bytes()
        found = policy.read(info["path"])
        if set(found) != set(info["names"]):
            raise ValueError(f"names differ: {sorted(found)} and {info['names']}")
        if info["fingerprint"] not in ("", xxhash.xxh3_128(data).hexdigest()):
            raise ValueError(f"{info['path']} is not what was published")
        if event.reply != "ignore":
            self.weights = {name: array.copy() for name, array in found.items()}

    async def finish_weight_update(self, version: str) -> None:
        self._updating = False
        self._version = version

    async def get_weight_version(self) -> str:
        return self._version

    async def collective_rpc(self, method: str) -> list[Any]:
        """The one worker's answers; see `cohort.actors.shared_memory.WorkerExtension`."""
        held = {name: digest(tensor) for name, tensor in policy.as_tensors(self.weights).items()}
        if method == "served_weights":
            return [held]
        assert method == "served_layout"
        feeds = {
            n: [{"name": n, "transposed": False, "digest": value}] for n, value in held.items()
        }
        return [{"layers": feeds, "tied": {}}]

    async def reset_prefix_cache(self, reset_running_requests: bool = False, **_: Any) -> bool:
        self._cached.clear()
        if reset_running_requests:
            for request in self._running.values():
                request.state = None
        self._ray.emit("reset", self._actor.name)
        return True


class LocalRolloutActor(RolloutActor):
    """The product's RolloutActor on an engine of this module."""

    async def start(self, cores: tuple[int, ...], serve_loaded: bool = False) -> Any:
        from transformers import AutoTokenizer

        ray, actor = current_ray(), current_actor()
        await asyncio.sleep(START_S * ray.slowness(actor.name))
        self._cores = cores
        self._tokenizer = AutoTokenizer.from_pretrained(self._spec.model_path)
        self._engine = start_engine(self._spec, self._tokenizer)
        if serve_loaded:
            self._version = 0
        return START_S

    async def place(self) -> Place:
        # All actors are in one process here: a number of its own tells whom to look at.
        return replace(await super().place(), pid=current_ray().pid_of(current_actor()))

    async def memory(self) -> int:
        return 1 << 30


def engine_spec(model: Path, **fields: Any) -> EngineSpec:
    """A spec for tests that make a RolloutActor or an Engine themselves."""
    usual: dict[str, Any] = {
        "model_path": str(model),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 64,
        "actors": ActorsConfig(),
        "seed": 0,
    }
    return EngineSpec(**usual | fields)


def start_engine(spec: EngineSpec, tokenizer: Any) -> Engine:
    """The product's Engine around a Vllm with the weights of the model folder."""
    llm = Vllm(policy.initial(len(tokenizer)), spec.actors.max_concurrent)
    return Engine(llm, spec, [tokenizer.eos_token_id])


def install_vllm(patch: pytest.MonkeyPatch) -> None:
    """Modules in the place of vLLM's, whose import takes seconds; the names that Engine uses."""

    class WeightTransferUpdateRequest:
        def __init__(self, update_info: dict[str, Any]) -> None:
            self.update_info = update_info

    class VLLMClientError(Exception):
        pass

    def tokens(prompt_token_ids: list[int]) -> dict[str, Any]:
        return {"prompt_token_ids": prompt_token_ids}

    numbers = itertools.count()
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SamplingParams},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(FINAL_ONLY=next(numbers), DELTA=next(numbers))
        },
        "vllm.inputs": {"TokensPrompt": tokens, "tokens_input": tokens},
        "vllm.exceptions": {"VLLMClientError": VLLMClientError},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferUpdateRequest": WeightTransferUpdateRequest
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
