"""What the layers of an engine compute with, as digests: the engine's side of `proof.py`.

On CPUs vLLM packs the weights of linear layers into memory of its kernels and drops the tensors, so
vLLM's own checksums see nothing of them. Here the digest is taken of the very tensor that a kernel
is made of, and stays with that kernel; where a layer computes with the tensor itself, the digest is
taken of it on every request. A tensor that was kept from an earlier version has another digest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

from cohort.actors.proof import MODULUS, Feed, digest
from cohort.actors.weight_file import TensorSpec

# They leave the tensors that they pack as they are, which may be read meanwhile.
UNTOUCHED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


@dataclass
class _Layer:
    """What a layer was loaded with.

    names: of its tensors. loaded: their digest, before they were packed or quantized; None where
    that is not done. kernel: what packed it, if anything. kept: digest of the tensors that are left
    afterwards; None when these are not what the layer was loaded with.
    """

    names: tuple[str, ...]
    loaded: Future[int] | int | None
    kernel: object
    kept: int | None = None


class Served:
    """Digests of one model's layers, from its updates on."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[torch.nn.Module, _Layer] = WeakKeyDictionary()
        self._feeds: WeakKeyDictionary[torch.nn.Module, list[Feed]] = WeakKeyDictionary()
        # How each layer ends up is the same at every update.
        self._changed: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()

    @contextmanager
    def watching(
        self, specs: list[tuple[TensorSpec, int]], base: int, executor: Executor
    ) -> Iterator[None]:
        """Keep the digests of every layer that is loaded in this block.

        Args:
            specs: What the file holds: each tensor, and the byte at which it begins.
            base: The address at which the file is mapped.
            executor: Digests tensors beside the loading.
        """
        places = sorted(
            (base + start, base + start + spec.nbytes, spec.name) for spec, start in specs
        )
        original = layerwise._layerwise_process

        def process(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
            loaded = list(info.loaded_weights)
            if layer not in self._feeds:
                self._feeds[layer] = [
                    _feed(tensor, places)
                    for _, arguments in loaded
                    for tensor in _given(arguments.arguments)
                ]
            names = tuple(dict.fromkeys(name for name, _ in loaded))
            self._load(layer, names, executor, lambda: original(layer, info))

        layerwise._layerwise_process = process
        try:
            yield
        finally:
            layerwise._layerwise_process = original
        for layer in list(self._layers):
            self._settle(layer)

    def _load(
        self,
        layer: torch.nn.Module,
        names: tuple[str, ...],
        executor: Executor,
        load: Callable[[], object],
    ) -> None:
        """Have a layer loaded; its tensors are digested before anything packs or quantizes them."""
        method = vars(layer).get("quant_method")
        found: list[Future[int] | int] = []
        if isinstance(method, QuantizeMethodBase):
            convert = method.process_weights_after_loading

            def digest_first(which: torch.nn.Module) -> None:
                tensors = _own(layer, names)
                if type(method) in UNTOUCHED:
                    found.append(executor.submit(_sum, tensors))
                else:
                    found.append(_sum(tensors))
                convert(which)

            # In the method's own dictionary, so that it hides the class's for this one call.
            vars(method)["process_weights_after_loading"] = digest_first
            try:
                load()
            finally:
                del vars(method)["process_weights_after_loading"]
        else:
            load()
        self._layers[layer] = _Layer(
            names, found[0] if found else None, vars(layer).get("cpu_linear")
        )

    def packed(self, layer: torch.nn.Module, names: tuple[str, ...], executor: Executor) -> None:
        """A layer that shares its tensors has packed them again, as they are now."""
        loaded = executor.submit(_sum, _own(layer, names))
        self._layers[layer] = _Layer(names, loaded, vars(layer).get("cpu_linear"))

    def _settle(self, layer: torch.nn.Module) -> None:
        """After an update: what is left of a layer's tensors, to notice when it is exchanged."""
        state = self._layers[layer]
        if isinstance(state.loaded, Future):
            state.loaded = state.loaded.result()
        if state.loaded is None:
            return
        if layer not in self._changed:
            self._changed[layer] = _sum(_own(layer, state.names)) != state.loaded
        if self._changed[layer]:
            state.kept = _sum(_own(layer, state.names))

    def layout(self, model: torch.nn.Module) -> dict[str, list[Feed]]:
        """For every layer: the tensors that it was loaded from."""
        return {
            name: self._feeds[layer]
            for name, layer in model.named_modules()
            if layer in self._feeds
        }

    def held(self, model: torch.nn.Module) -> dict[str, int | None]:
        """For every layer: the digest of what it computes with; None when that was not loaded."""
        known: dict[tuple[int, ...], int] = {}
        return {
            name: self._held(layer, known) if layer in self._layers else None
            for name, layer in model.named_modules()
            if layer in self._layers or "cpu_linear" in vars(layer)
        }

    def _held(self, layer: torch.nn.Module, known: dict[tuple[int, ...], int]) -> int | None:
        state = self._layers[layer]
        tensors = _own(layer, state.names)
        # A tied head has the embedding's own tensor: once is enough.
        key = tuple(map(id, tensors))
        live = known[key] = known[key] if key in known else _sum(tensors)
        if state.loaded is None:
            return live
        if not isinstance(state.loaded, int):
            # Its update failed half-way.
            return None
        expected = state.kept if self._changed[layer] else state.loaded
        same = live == expected and vars(layer).get("cpu_linear") is state.kernel
        return state.loaded if same else None


def _own(layer: torch.nn.Module, names: tuple[str, ...]) -> list[torch.Tensor]:
    tensors = {**layer._parameters, **layer._buffers}
    return [tensor for name in names if (tensor := tensors.get(name)) is not None]


def _sum(tensors: list[torch.Tensor]) -> int:
    return sum(digest(tensor.data) for tensor in tensors) % MODULUS


def _given(arguments: dict[str, object]) -> list[torch.Tensor]:
    """What a weight loader was given to load; `param` is where it goes."""
    return [
        value
        for name, value in arguments.items()
        if name != "param" and isinstance(value, torch.Tensor)
    ]


def _feed(tensor: torch.Tensor, places: list[tuple[int, int, str]]) -> Feed:
    """places: (begin, end, name) of the file's tensors in memory, in order."""
    at = tensor.data_ptr()
    index = bisect_right(places, at, key=lambda place: place[0]) - 1
    inside = index >= 0 and at < places[index][1]
    turned = tensor.dim() > 1 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1
    return Feed(name=places[index][2] if inside else "", transposed=turned, digest=digest(tensor))
