"""Frames: how records lie in a file, so that a torn or damaged one is told from a whole one.

    mark (4 bytes), length (4 bytes, little-endian), CRC-32 (4 bytes) of length and payload, payload

Whatever a kill or a full disk leaves behind the last whole frame is a torn tail. A frame that is
not whole with a whole one behind it is damage: something was there and can no longer be read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

MARK = b"\xc0JL\x01"
HEADER = struct.Struct("<4sII")
LONGEST = 2**32 - 1

Bytes = bytes | mmap


class DamagedError(Exception):
    """A frame in the middle of a file cannot be read. offset: where it begins."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the record at byte {offset} is damaged")
        self.offset = offset


@dataclass(frozen=True)
class Frame:
    """Where a frame begins in its file, what it holds, and where the next one begins."""

    offset: int
    payload: bytes
    end: int


def frame(payload: bytes) -> bytes:
    """The frame of a payload.

    Example:
        >>> [found.payload for found in frames(frame(b"one") + frame(b"two"))]
        [b'one', b'two']
    """
    if len(payload) > LONGEST:
        raise ValueError(f"a record of {len(payload)} bytes; the longest is {LONGEST}")
    return HEADER.pack(MARK, len(payload), _checksum(payload)) + payload


def frame_at(data: Bytes, offset: int) -> Frame | None:
    """The whole frame that begins there; None: there is none."""
    start = offset + HEADER.size
    if start > len(data):
        return None
    mark, length, checksum = HEADER.unpack(data[offset:start])
    if mark != MARK or start + length > len(data):
        return None
    payload = data[start : start + length]
    return Frame(offset, payload, start + length) if _checksum(payload) == checksum else None


def frames(data: Bytes) -> Iterator[Frame]:
    """All whole frames from the beginning on; what is behind the last one is a torn tail.

    Raises:
        DamagedError: A frame is not whole, and another behind it is.
    """
    offset = 0
    while found := frame_at(data, offset):
        yield found
        offset = found.end
    candidate = data.find(MARK, offset + 1)
    while candidate != -1:
        if frame_at(data, candidate):
            raise DamagedError(offset)
        candidate = data.find(MARK, candidate + 1)


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "little")))
