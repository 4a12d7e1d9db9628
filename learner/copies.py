"""A rank's state in shared memory, where it outlives the rank's process.

    copies/
      0/, 1/                  generations: number n lies in n % 2, so that a death while one is
                              written leaves the one before
        *.pt                  the bytes of the tensors, one after another
        *.pt.index            where each of them lies, and what is not a tensor
        rank-0.json           written last: the generation, and digests of this rank's files
      beside/                 what else a checkpoint has, while one is written from a copy

DeepSpeed decides what belongs to the state, as for a checkpoint: `MemoryWriter` takes the place of
its writer of files. Copying into memory that is mapped already takes a tenth of the time that torch
needs for a file.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash

from cohort.learner.checkpoint import CheckpointError

FOLDER = "copies"
GENERATIONS = 2
ALIGNMENT = 64
INDEX = ".index"


class Copies:
    """The copies of one rank. The driver numbers the generations; those of all ranks go together.

    Args:
        folder: On this machine; removed by its owner, not by the rank.
        rank: Whose copies.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._rank = rank
        self._views: dict[Path, mmap.mmap] = {}

    def place(self, generation: int) -> Path:
        """Where the files of a generation lie."""
        return self.folder / str(generation % GENERATIONS)

    @contextmanager
    def writing(self, generation: int) -> Iterator[MemoryWriter]:
        """A block that writes a generation. It counts when the block ends without an error."""
        marker = self._marker(generation)
        marker.unlink(missing_ok=True)
        writer = MemoryWriter(self._views)
        yield writer
        marker.parent.mkdir(parents=True, exist_ok=True)
        temporary = marker.with_suffix(".tmp")
        found = {"generation": generation, "digests": writer.digests}
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.rename(marker)

    def require(self, generation: int) -> list[str]:
        """The names of this rank's files of a generation; CheckpointError unless they are whole."""
        marker = self._marker(generation)
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"rank {self._rank} has no copy {generation} of its state on this machine"
            ) from None
        whole = found["generation"] == generation and all(
            (self.place(generation) / name).is_file()
            and digest_of(self.place(generation) / name) == digest
            for name, digest in found["digests"].items()
        )
        if not whole:
            raise CheckpointError(f"copy {generation} of the state of rank {self._rank} is damaged")
        return list(found["digests"])

    def _marker(self, generation: int) -> Path:
        return self.place(generation) / f"rank-{self._rank}.json"


def same_place(one: int, other: int) -> bool:
    """Whether one of two generations is written over the other."""
    return one % GENERATIONS == other % GENERATIONS


class MemoryWriter:
    """Takes the place of DeepSpeed's writer and reader of checkpoint files.

    Args:
        views: Memory that stays mapped between copies, by file: having the kernel find and clear
            new pages takes longer than filling them.

    Attributes:
        digests: xxh3-128 of each file that was written, by its name.
    """

    def __init__(self, views: dict[Path, mmap.mmap]) -> None:
        self._views = views
        self.digests: dict[str, str] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: object, path: str) -> None:
        """Write one object with tensors in it."""
        tensors = _Tensors()
        skeleton = tensors.take_from(state_dict)
        target = Path(path)
        view = self._view(target, tensors.size)
        tensors.copy_into(view)
        index = target.with_name(f"{target.name}{INDEX}")
        index.write_bytes(pickle.dumps((tensors.layout, skeleton)))
        self.digests[target.name] = xxhash.xxh3_128_hexdigest(view)
        self.digests[index.name] = digest_of(index)

    def load(self, path: str, map_location: object = None) -> object:  # noqa: ARG002
        """The object, its tensors in main memory: copies, for the file is written again."""
        view, layout, skeleton = _opened(Path(path))
        return _with_tensors(skeleton, [part.read(view) for part in layout])

    def create(self, info: object) -> None:
        """DeepSpeed tells when a checkpoint begins."""

    def commit(self, info: object) -> bool:  # noqa: ARG002
        """DeepSpeed tells when all of its files are written; the marker says it here."""
        return True

    def is_decoupled(self) -> bool:
        """Nothing is written behind DeepSpeed's back."""
        return False

    def _view(self, path: Path, size: int) -> mmap.mmap:
        view = self._views.get(path)
        if view is not None and len(view) == size and path.is_file():
            return view
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "rb+") as file:
            # Reserves the pages: a full /dev/shm is an error here, not a SIGBUS while copying.
            os.posix_fallocate(file.fileno(), 0, size)
            view = self._views[path] = mmap.mmap(file.fileno(), size)
        return view


class _Part:
    """Where a tensor lies in a file."""

    def __init__(self, offset: int, tensor: torch.Tensor) -> None:
        self.offset = offset
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.elements = tensor.numel()

    def within(self, view: mmap.mmap) -> torch.Tensor:
        if self.elements == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(view, dtype=self.dtype, count=self.elements, offset=self.offset)
        return flat.view(self.shape)

    def read(self, view: mmap.mmap) -> torch.Tensor:
        return self.within(view).clone()


class _Tensors:
    """The tensors of an object, each place in memory once."""

    def __init__(self) -> None:
        self.layout: list[_Part] = []
        self.size = 1
        self._tensors: list[torch.Tensor] = []
        self._known: dict[tuple[object, ...], int] = {}

    def take_from(self, state: object) -> bytes:
        """The object without its tensors."""
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(state)
        return buffer.getvalue()

    def number(self, tensor: torch.Tensor) -> int:
        # Tied weights lie in the same place under several names.
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        key = place if tensor.numel() else (len(self._tensors),)
        if key not in self._known:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            self._known[key] = len(self._tensors)
            self._tensors.append(tensor)
            self.layout.append(_Part(offset, tensor))
            self.size = offset + tensor.numel() * tensor.element_size()
        return self._known[key]

    def copy_into(self, view: mmap.mmap) -> None:
        for part, tensor in zip(self.layout, self._tensors, strict=True):
            if part.elements:
                part.within(view).copy_(tensor.detach())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: _Tensors) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, obj: object) -> int | None:
        return self._tensors.number(obj) if isinstance(obj, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


def look_at(path: Path) -> object:
    """The object that `MemoryWriter.save` wrote; its tensors are the file, and change with it."""
    view, layout, skeleton = _opened(path)
    return _with_tensors(skeleton, [part.within(view) for part in layout])


def _opened(path: Path) -> tuple[mmap.mmap, list[_Part], bytes]:
    layout, skeleton = pickle.loads(path.with_name(f"{path.name}{INDEX}").read_bytes())
    with path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), layout, skeleton


def _with_tensors(skeleton: bytes, tensors: list[torch.Tensor]) -> object:
    return _Unpickler(io.BytesIO(skeleton), tensors).load()


def digest_of(path: Path) -> str:
    """xxh3-128 over a file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return xxhash.xxh3_128_hexdigest(view)
