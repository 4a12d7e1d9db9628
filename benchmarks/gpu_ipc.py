"""The part ipc of gpu.py: weights from one process to another on the same GPU."""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

Row = dict[str, Any]
REPEATS = 4
TENSORS = 100


def ipc(given: Any, attempt: Callable[[str, Callable[[], Row]], Row]) -> Iterator[Row]:
    """1 and 3 GB of bfloat16, both ways."""
    for size in (10**9, 3 * 10**9):
        numbers = size // 2 // (1000 if given.tiny else 1)
        name = f"{numbers * 2 / 1e9:g} GB"
        yield attempt(f"CUDA IPC, {name}", lambda n=numbers: by_ipc(n, given.device))
        yield attempt(f"shared memory, {name}", lambda n=numbers: by_file(n, given.device))


def by_ipc(numbers: int, device: str) -> Row:
    """One packed buffer: its handle goes to the other process, which copies the tensors out."""
    packed = torch.randn(numbers, device=device).bfloat16()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=receive, args=(theirs, numbers, device), daemon=True)
    other.start()
    try:
        if not ours.poll(40):
            raise TimeoutError("the other process did not start within 40 s")
        ours.recv()
        found = []
        for _ in range(REPEATS + 1):
            began = time.monotonic()
            send(ours, packed)
            if not ours.poll(20):
                raise TimeoutError("the other process said nothing within 20 s")
            answer = ours.recv()
            found.append((time.monotonic() - began, *answer))
        total, opened, copied, checksum = (
            statistics.median(values) for values in zip(*found[1:], strict=True)
        )
        assert checksum == checksum_of(packed), "what arrived is not what was sent"
        other.join(20)
    finally:
        other.kill()
    nbytes = numbers * 2
    return {
        "first_s": found[0][0], "s": total, "open_s": opened, "copy_s": copied,
        "gb_per_s": nbytes / total / 1e9, "copy_gb_per_s": nbytes / copied / 1e9,
    }  # fmt: skip


def send(connection: Any, tensor: torch.Tensor) -> None:
    """A tensor's handle through a pipe."""
    from io import BytesIO
    from multiprocessing.reduction import ForkingPickler

    buffer = BytesIO()
    ForkingPickler(buffer).dump(tensor)
    connection.send_bytes(buffer.getvalue())


def checksum_of(tensor: torch.Tensor) -> float:
    """The sum of its bits, which no order of adding changes."""
    return float(tensor.view(torch.int16).sum(dtype=torch.int64))


def receive(connection: Connection, numbers: int, device: str) -> None:
    """The other process: copy what comes into tensors of its own."""
    import pickle

    sizes = [numbers // TENSORS] * (TENSORS - 1)
    sizes.append(numbers - sum(sizes))
    own = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    connection.send("ready")
    for _ in range(REPEATS + 1):
        handle = connection.recv_bytes()
        began = time.monotonic()
        packed = pickle.loads(handle)
        opened = time.monotonic()
        for mine, theirs in zip(own, packed.split(sizes), strict=True):
            mine.copy_(theirs)
        if device == "cuda":
            torch.cuda.synchronize()
        copied = time.monotonic()
        checksum = checksum_of(torch.cat(own))
        del packed
        connection.send((opened - began, copied - opened, checksum))


def by_file(numbers: int, device: str) -> Row:
    """Our published file: written by `WeightFiles`, mapped and copied to the device."""
    from cohort.actors.weight_file import TensorSpec, tensors_in
    from cohort.learner.weights import WeightFiles

    whole = torch.randn(numbers, device=device).bfloat16()
    tensors = {f"t{i}": part for i, part in enumerate(whole.chunk(TENSORS))}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    own = {name: torch.empty_like(t) for name, t in tensors.items()}
    written, read = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        files = WeightFiles(Path(shm) / "weights")
        for version in range(3):
            began = time.monotonic()
            files.publish(version, [version - 1], specs, tensors.items())
            written.append(time.monotonic() - began)
            began = time.monotonic()
            with files.path(version).open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name, tensor in tensors_in(view):
                own[name].copy_(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            read.append(time.monotonic() - began)
        assert all(torch.equal(own[name], t) for name, t in tensors.items())
    total = written[-1] + read[-1]
    return {
        "first_s": written[0] + read[0], "s": total, "publish_s": written[-1], "read_s": read[-1],
        "gb_per_s": numbers * 2 / total / 1e9,
    }  # fmt: skip
