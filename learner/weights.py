"""The policy's weights as a published file: gathered under ZeRO, written once, fingerprinted.

Adapters are published as the weights that they are merged into.

The file is plain safetensors in shared memory, under the names of a Hugging Face checkpoint. A tied
tensor appears once, under its first name, as in the checkpoint; the receiving engine knows that its
output layer shares it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from cohort.actors.weight_file import TensorSpec, encode_header
from cohort.learner.lora import LoraLayer, lora_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Under ZeRO-3, parameters of about this many elements are whole on every rank at one time.
BUCKET_ELEMENTS = 64 * 1024 * 1024


def check_names(model: PreTrainedModel) -> None:
    """Raise ValueError when the model's tensors are not those of its checkpoints.

    transformers fuses the experts of mixture models while loading; engines read the unfused form.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = set(model.state_dict())
    published = set(revert_weight_conversion(model, model.state_dict()))
    if names != published:
        raise ValueError(
            f"{type(model).__name__} is held in another form than in its checkpoints, which the "
            f"learner cannot publish: {sorted(names ^ published)[:4]}"
        )


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors in the order of its state dict, a tied one once; no adapters."""
    # The state dict holds tied parameters under all names, and only persistent buffers.
    # keep_vars: the parameters themselves, which carry what ZeRO-3 knows about them.
    seen = {id(tensor) for layer in lora_layers(model).values() for tensor in _adapter(layer)}
    named = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def _adapter(layer: LoraLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A, layer.lora_B


def digest_of(model: torch.nn.Module) -> str:
    """xxh3-128 over names and numbers of the model's tensors, which are whole."""
    digest = xxhash.xxh3_128()
    for name, tensor in named_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shape(tensor: torch.Tensor, zero_stage: int) -> tuple[int, ...]:
    # A parameter that ZeRO-3 has partitioned is empty; its true shape is kept aside.
    return tuple(getattr(tensor, "ds_shape", tensor.shape) if zero_stage == 3 else tensor.shape)


def weight_specs(model: torch.nn.Module, zero_stage: int) -> list[TensorSpec]:
    """What `gather_named_weights` yields, in its order, without gathering anything."""
    return [
        TensorSpec(name, _shape(tensor, zero_stage), tensor.dtype)
        for name, tensor in named_tensors(model).items()
    ]


def gather_named_weights(
    model: torch.nn.Module, zero_stage: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors under their Hugging Face names; a tied tensor under its first name only.

    Of a layer with an adapter: the weight that it computes with.

    Every rank must run the iterator to its end: under ZeRO-3 each bucket is gathered by all ranks
    together, in the same order. A tensor is valid until the next one is asked for.
    """
    layers = {id(layer.weight): layer for layer in lora_layers(model).values()}
    for bucket in shared_buckets(named_tensors(model), zero_stage):
        needed = [tensor for _, tensor in bucket]
        needed += [t for x in needed if id(x) in layers for t in _adapter(layers[id(x)])]
        with whole(needed) if zero_stage == 3 else nullcontext():
            for name, tensor in bucket:
                layer = layers.get(id(tensor))
                yield name, tensor.detach() if layer is None else layer.merged()


def gather_adapters(
    model: torch.nn.Module, zero_stage: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, A and B of every layer with an adapter, whole; as `gather_named_weights` does it."""
    for name, layer in lora_layers(model).items():
        with whole(_adapter(layer)) if zero_stage == 3 else nullcontext():
            yield name, layer.lora_A.detach(), layer.lora_B.detach()


def whole(
    tensors: Sequence[torch.Tensor], modifier_rank: int | None = None
) -> AbstractContextManager[object]:
    """A context in which these ZeRO-3 parameters are whole on every rank.

    Args:
        tensors: Parameters, and buffers, which are always whole.
        modifier_rank: The rank whose changes to them are kept.
    """
    import deepspeed

    parameters = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def shared_buckets(
    named: dict[str, torch.Tensor], zero_stage: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of together about BUCKET_ELEMENTS: what may be whole at one time."""
    bucket: list[tuple[str, torch.Tensor]] = []
    elements = 0
    for name, tensor in named.items():
        size = torch.Size(_shape(tensor, zero_stage)).numel()
        if bucket and elements + size > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append((name, tensor))
        elements += size
    if bucket:
        yield bucket


class WeightFiles:
    """The versions that a learner has published in a folder, one file each.

    Memory of a version that nobody reads any more is written again, and stays mapped: having the
    kernel find and clear new pages, or only map old ones, takes longer than filling them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._views: dict[int, mmap.mmap] | None = None

    def path(self, version: int) -> Path:
        """Where a version is published."""
        return self.folder / f"v{version}.safetensors"

    def publish(
        self,
        version: int,
        keep: Sequence[int],
        specs: Sequence[TensorSpec],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> tuple[str, int]:
        """Write one version through a temporary name.

        Versions that are neither kept nor written are gone afterwards.

        Args:
            version: What is written.
            keep: Versions that stay as they are; all others must have no readers.
            specs: What `tensors` will yield, in its order.
            tensors: Names and tensors, each copied straight into the mapped file.

        Returns:
            (fingerprint, xxh3-128 over the file; size in bytes).

        Raises:
            ValueError: A tensor is not what its spec says, or one is missing.
            FileExistsError: The folder is not this user's own.
        """
        _own_folder(self.folder)
        if self._views is None:
            self._views = _left_by_another(self.folder)
        # The folder goes with its owner, which may be another by now.
        there = {old: view for old, view in self._views.items() if self.path(old).is_file()}
        self._views = there
        header, offsets, size = encode_header(specs)
        temporary = self.folder / f".v{version}.{os.getpid()}.tmp"
        unread = [old for old in self._views if old != version and old not in keep]
        same_size = [old for old in unread if len(self._views[old]) == size]
        try:
            if same_size:
                self.path(same_size[0]).rename(temporary)
                view = self._views.pop(same_size[0])
                unread.remove(same_size[0])
            else:
                view = _new_file(temporary, size)
            view[: len(header)] = header
            _fill(view, specs, offsets, tensors)
            fingerprint = xxhash.xxh3_128(view).hexdigest()
            temporary.rename(self.path(version))
        finally:
            temporary.unlink(missing_ok=True)
        self._views[version] = view
        for old in unread:
            self.path(old).unlink()
            del self._views[old]
        return fingerprint, size


def _left_by_another(folder: Path) -> dict[int, mmap.mmap]:
    """The versions that a rank which died has published, by number; its half-written file goes."""
    for torn in folder.glob(".v*.tmp"):
        torn.unlink()
    views = {}
    for path in folder.glob("v*.safetensors"):
        with path.open("rb+") as file:
            views[int(path.stem[1:])] = mmap.mmap(file.fileno(), 0)
    return views


def _own_folder(folder: Path) -> None:
    """Make a folder for this user alone, or accept one that nobody else can write to.

    Raises FileExistsError when there is something else of that name, a link for example.
    """
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
        if not private or found.st_uid != os.getuid():
            raise FileExistsError(
                f"{folder} is not a folder of this user's own: weights are not published into it"
            ) from None


def _new_file(path: Path, size: int) -> mmap.mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "rb+") as file:
        file.truncate(size)
        # Reserves the pages: a full /dev/shm is an error here, not a SIGBUS while copying.
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _fill(
    view: mmap.mmap,
    specs: Sequence[TensorSpec],
    offsets: Sequence[int],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    written = 0
    for spec, offset, (name, tensor) in zip(specs, offsets, tensors, strict=True):
        if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
            raise ValueError(f"expected {spec}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        if spec.nbytes:
            target = torch.frombuffer(
                view, dtype=spec.dtype, count=tensor.numel(), offset=offset
            ).view(spec.shape)
            target.copy_(tensor)
            del target
        written += 1
    if written != len(specs):
        raise ValueError(f"{written} tensors came, {len(specs)} were announced")
