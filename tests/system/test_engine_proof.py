"""Engines that do not load what they were told to: each is caught at that update.

Weights are bfloat16 and move as at a learning rate of 1e-6: few numbers change, each by one step of
its last bit, far too little for any log-prob to tell. The faults are put into the engine's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cohort.actors.config import ActorsConfig
from cohort.actors.engine import EngineSpec
from cohort.actors.records import Failure, WeightsInfo
from cohort.actors.rollout import RolloutActor
from cohort.learner.weights import WeightFiles, gather_named_weights, weight_specs
from tests.models import tiny_gpt2, tiny_llama, tiny_qwen2

pytestmark = pytest.mark.system

TIMEOUT = 120
PROBE = list(range(20, 40))


class Open(RolloutActor):
    """An actor whose engine process runs what a test gives it."""

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        engine: Any = self._engine
        return await engine._llm.collective_rpc(function, args=arguments)


class Served:
    """An engine, the weights' float32 masters, and the versions published so far."""

    def __init__(self, actor: Any, folder: Path) -> None:
        self.actor = actor
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        torch.manual_seed(0)
        # What bfloat16 has rounded away: a small step may now cross to the next number.
        self.masters = {
            name: p.float() + (torch.rand(p.shape) - 0.5) * 2**-8 * p.float().abs()
            for name, p in self.model.named_parameters()
        }
        self.files = WeightFiles(folder.parent / "published")
        self.version = -1
        self.changed: list[str] = []

    def publish(self, rate: float = 1e-6) -> WeightsInfo:
        """Move every weight by `rate`, publish as the learner does."""
        before = {name: p.clone() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            master = self.masters[name]
            master += rate * torch.randn_like(master).sign()
            parameter.data.copy_(master)
        self.changed = [
            name for name, p in self.model.named_parameters() if not torch.equal(p, before[name])
        ]
        self.version += 1
        specs = weight_specs(self.model, 0)
        keep = [self.version - 1, self.version - 2]
        digest, size = self.files.publish(
            self.version, keep, specs, gather_named_weights(self.model, 0)
        )
        node = ray.get_runtime_context().get_node_id()
        names = tuple(spec.name for spec in specs)
        path = str(self.files.path(self.version))
        return WeightsInfo(self.version, names, digest, size, path, node)

    def sync(self, info: WeightsInfo) -> Any:
        return ray.get(self.actor.sync.remote(info, PROBE), timeout=TIMEOUT)

    def inside(self, function: Callable[..., Any], *arguments: Any) -> None:
        ray.get(self.actor.run.remote(function, *arguments), timeout=TIMEOUT)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


MAKERS = {"llama-tied": tiny_llama, "gpt2": tiny_gpt2, "qwen2-tied": tiny_qwen2}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[] if kind == "llama-tied" else [pytest.mark.exhaustive])
        for kind in MAKERS
    ],
)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = MAKERS[request.param](
        tmp_path_factory.mktemp("engine") / "model", dtype=torch.bfloat16
    )
    limits = ActorsConfig(max_concurrent=64, kv_cache_gib=0.25)
    spec = EngineSpec(str(folder), "bfloat16", "cpu", 512, limits, seed=0)
    remote = ray.remote(Open).options(
        num_cpus=0.1,
        runtime_env={"env_vars": {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}},
    )
    actor = remote.remote(f"proof-{request.param}", spec, str(folder.parent / "logs"))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    answer = ray.get(actor.start.remote(cores), timeout=TIMEOUT)
    assert isinstance(answer, float), answer
    yield Served(actor, folder)
    ray.kill(actor)


@pytest.fixture
def served(engine: Served) -> Served:
    """An engine that holds a version which it has loaded without a fault."""
    for _ in range(2):
        answer = engine.sync(engine.publish())
        assert not isinstance(answer, Failure), answer.message
    return engine


# What follows runs in the engine's process, once, at its next update.


def ignore(worker: Any, *_: Any) -> None:
    engine = worker.weight_transfer_engine

    def update(_info: Any) -> None:
        del engine.update_weights

    engine.update_weights = update


def repeat(worker: Any, before: str, *_: Any) -> None:
    """The whole version before, instead of the one that it was told to load."""
    engine = worker.weight_transfer_engine
    real = engine.update_weights

    def update(info: dict[str, Any]) -> None:
        del engine.update_weights
        real({**info, "path": before, "fingerprint": ""})

    engine.update_weights = update


def mix(worker: Any, before: str, name: str) -> None:
    """One tensor of the version before."""
    from cohort.actors import shared_memory

    del worker
    real, old = shared_memory.tensors_in, load_file(before)

    def tensors(view: Any) -> Any:
        shared_memory.tensors_in = real
        for key, tensor in real(view):
            yield key, old[key] if key == name else tensor

    shared_memory.tensors_in = tensors


def tear(worker: Any, before: str, name: str) -> None:
    """One tensor that is new up to some row, and old from there on."""
    from cohort.actors import shared_memory

    del worker
    real, old = shared_memory.tensors_in, load_file(before)

    def tensors(view: Any) -> Any:
        shared_memory.tensors_in = real
        for key, tensor in real(view):
            if key != name:
                yield key, tensor
                continue
            differs = (tensor != old[key]).flatten(1).any(1).nonzero().flatten()
            torn = tensor.clone()
            torn[int(differs[-1]) :] = old[key][int(differs[-1]) :]
            yield key, torn

    shared_memory.tensors_in = tensors


def keep_a_kernel(worker: Any, *_: Any) -> None:
    """One layer goes on with what it computed with before, after everything was loaded."""
    engine = worker.weight_transfer_engine
    real = engine.update_weights
    layer = next(
        m
        for name, m in worker.model_runner.get_model().named_modules()
        if name.endswith(("down_proj", "mlp.c_proj"))
    )

    def update(info: dict[str, Any]) -> None:
        del engine.update_weights
        before = layer.cpu_linear
        real(info)
        layer.cpu_linear = before

    engine.update_weights = update


def keep_the_head(worker: Any, *_: Any) -> None:
    """What vLLM does by itself with a tied head: it stays as it was."""
    from cohort.actors import shared_memory

    del worker
    real = shared_memory._tied_pairs
    calls: list[int] = []

    def none(model: Any) -> Any:
        # Asked first for what is missing, then for what is to be packed again.
        calls.append(1)
        if len(calls) < 2:
            return real(model)
        shared_memory._tied_pairs = real
        return []

    shared_memory._tied_pairs = none


def spoil_a_number(worker: Any, *_: Any) -> None:
    """One number of the embedding, after everything was loaded."""
    engine = worker.weight_transfer_engine
    real = engine.update_weights

    def update(info: dict[str, Any]) -> None:
        del engine.update_weights
        real(info)
        for name, parameter in worker.model_runner.get_model().named_parameters():
            if "embed" in name or "wte" in name:
                parameter.data.view(torch.int16)[7, 3] += 1
                return

    engine.update_weights = update


FAULTS = [ignore, repeat, mix, tear, keep_a_kernel, keep_the_head, spoil_a_number]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_every_fault_is_caught_at_its_update(served: Served, fault: Callable[..., None]) -> None:
    before = str(served.files.path(served.version))
    info = served.publish()
    matrices = [n for n in served.changed if served.masters[n].dim() > 1 and "emb" not in n]
    assert matrices, "a step must move something"
    served.inside(fault, before, matrices[len(matrices) // 2])
    answer = served.sync(info)
    assert isinstance(answer, Failure), f"{fault.__name__} was not noticed"
    assert answer.kind == "bug"
    assert "serve" in answer.message
    # The next update has no fault, and is taken.
    after = served.sync(served.publish())
    assert not isinstance(after, Failure), after.message


def test_an_update_that_moves_nothing_is_right(served: Served) -> None:
    for _ in range(2):
        answer = served.sync(served.publish(rate=0.0))
        assert not isinstance(answer, Failure), answer.message


def test_such_steps_are_too_small_for_the_probe(served: Served) -> None:
    """Why the probe alone is no proof: versions differ by less than its tolerance."""
    first = served.sync(served.publish())
    second = served.sync(served.publish())
    moved = sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)
    assert served.changed
    assert moved < 0.05
