"""The policy's weights as a published file: gathered under ZeRO, written once, fingerprinted.

The file is plain safetensors (https://huggingface.co/docs/safetensors, "Format"), in shared
memory, under the names of a Hugging Face checkpoint. A tied tensor appears once, under its first
name, as in the checkpoint; the receiving engine knows that its output layer shares it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

# Under ZeRO-3, parameters of about this many elements are whole on every rank at one time.
BUCKET_ELEMENTS = 64 * 1024 * 1024
ALIGNMENT = 64

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one published tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def check_names(model: Any) -> None:
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


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # The state dict holds tied parameters under all names, and only persistent buffers.
    # keep_vars: the parameters themselves, which carry what ZeRO-3 knows about them.
    seen: set[int] = set()
    named = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def _shape(tensor: Any, zero_stage: int) -> tuple[int, ...]:
    # A parameter that ZeRO-3 has partitioned is empty; its true shape is kept aside.
    if zero_stage == 3 and isinstance(tensor, torch.nn.Parameter):
        return tuple(tensor.ds_shape)
    return tuple(tensor.shape)


def weight_specs(model: torch.nn.Module, zero_stage: int) -> list[TensorSpec]:
    """What `gather_named_weights` yields, in its order, without gathering anything."""
    return [
        TensorSpec(name, _shape(tensor, zero_stage), tensor.dtype)
        for name, tensor in _named(model).items()
    ]


def gather_named_weights(
    model: torch.nn.Module, zero_stage: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors under their Hugging Face names; a tied tensor under its first name only.

    Every rank must run the iterator to its end: under ZeRO-3 each bucket is gathered by all ranks
    together, in the same order. A tensor is valid until the next one is asked for.
    """
    for bucket in _buckets(_named(model), zero_stage):
        with _whole(bucket) if zero_stage == 3 else nullcontext():
            for name, tensor in bucket:
                yield name, tensor.detach()


def _whole(bucket: list[tuple[str, torch.Tensor]]) -> Any:
    import deepspeed

    parameters = {id(t): t for _, t in bucket if isinstance(t, torch.nn.Parameter)}
    return deepspeed.zero.GatheredParameters(list(parameters.values()))


def _buckets(
    named: dict[str, torch.Tensor], zero_stage: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
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


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, list[int], int]:
    """The file's first bytes, where each tensor starts in the file, and the file's size."""
    entries: dict[str, Any] = {}
    offset = 0
    offsets = []
    for spec in specs:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offsets.append(offset)
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces after the JSON are part of the format; they align the data.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [start + o for o in offsets], start + offset


def write_weights(
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: str | Path,
    recycle: Path | None = None,
) -> tuple[str, int]:
    """Write one safetensors file through a temporary name; returns (fingerprint, bytes).

    specs: what will come, in order; tensors: the same names in the same order. Each tensor is
    copied straight into the mapped file, so nothing but the file itself takes memory.

    recycle: an older file that nobody reads any more; its pages are written again, which is several
    times faster than having the kernel find and clear new ones. It no longer exists afterwards.

    Raises ValueError when a tensor is not what its spec says, or one is missing.
    """
    path = Path(path)
    header, offsets, size = _header(specs)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if recycle is not None:
            recycle.rename(temporary)
        with open(temporary, "wb+" if recycle is None else "rb+") as file:
            file.truncate(size)
            # Reserves the pages: a full /dev/shm is an error here, not a SIGBUS while copying.
            os.posix_fallocate(file.fileno(), 0, size)
            with mmap.mmap(file.fileno(), size) as view:
                view[: len(header)] = header
                fingerprint = _fill(view, specs, offsets, tensors)
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return fingerprint, size


def _fill(
    view: mmap.mmap,
    specs: Sequence[TensorSpec],
    offsets: Sequence[int],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> str:
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
    return xxhash.xxh3_128(view).hexdigest()


def read_header(path: str | Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors in a safetensors file, in file order."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return {
        name: TensorSpec(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def version_path(folder: str | Path, version: int) -> Path:
    """Where version `version` of the weights is published in `folder`."""
    return Path(folder) / f"v{version}.safetensors"


def old_versions(folder: str | Path, keep: Sequence[int]) -> list[Path]:
    """Published files other than those of `keep`."""
    kept = {version_path(folder, version) for version in keep}
    return [path for path in Path(folder).glob("v*.safetensors") if path not in kept]
