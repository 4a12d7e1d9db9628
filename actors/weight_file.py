"""The file in which weights travel: plain safetensors, written by the learner, mapped by engines.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

FileBytes: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

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


def encode_header(specs: Sequence[TensorSpec]) -> tuple[bytes, list[int], int]:
    """The file's first bytes, where each tensor starts in the file, and the file's size."""
    entries: dict[str, dict[str, object]] = {}
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


def decode_header(data: FileBytes) -> list[tuple[TensorSpec, int]]:
    """The tensors in a file's bytes, in file order, and where each starts.

    Raises ValueError when the bytes are no safetensors file, or end before the tensors do.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        entries = json.loads(bytes(data[8 : 8 + length]))
    except (struct.error, ValueError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    entries.pop("__metadata__", None)
    found = []
    for name, entry in entries.items():
        spec = TensorSpec(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end - start != spec.nbytes or end > len(data):
            raise ValueError(f"{name}: its bytes {start}-{end} are not in the file or too few")
        found.append((spec, start))
    return found


def tensors_in(data: FileBytes) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file as a view of its (writable) bytes, which live as long as a view."""
    for spec, start in decode_header(data):
        count = torch.Size(spec.shape).numel()
        if count == 0:
            yield spec.name, torch.empty(spec.shape, dtype=spec.dtype)
        else:
            flat = torch.frombuffer(data, dtype=spec.dtype, count=count, offset=start)
            yield spec.name, flat.view(spec.shape)


def write_new(path: Path, data: memoryview) -> None:
    """Write a file that must not exist yet, readable by this user alone.

    Raises FileExistsError where there is something of that name already, a link for example.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
