"""Frames between a worker and its process: a length (8 bytes, big-endian) and a body."""

from __future__ import annotations

import asyncio
import struct

LENGTH = struct.Struct(">Q")
MAX_FRAME = 1 << 40
# An answer of a process of environments.
MAX_REPLY = 64 << 20


def write_frame(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Write one frame."""
    writer.write(LENGTH.pack(len(body)) + body)


async def read_frame(reader: asyncio.StreamReader, limit: int = MAX_FRAME) -> bytes:
    """Read one frame.

    Raises:
        ValueError: It is longer than `limit` bytes.
        asyncio.IncompleteReadError: The other side is gone.
    """
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if size > limit:
        raise ValueError(f"a frame of {size} bytes")
    return await reader.readexactly(size)
