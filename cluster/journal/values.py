"""Values as bytes and back, exactly: msgpack, with tuples, arrays and our own records.

Token ids, log-probs (float32) and rewards come back bit for bit. Of a dataset's columns and an
environment's state, which may hold anything, what msgpack does not know is kept as its text: a
group is scored already when it is written, and nothing but people reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgpack
import numpy as np

# Of msgpack's extension types.
TUPLE, ARRAY, RECORD, TEXT = 1, 2, 3, 4


class Codec:
    """Packs and unpacks values.

    Args:
        records: Dataclasses whose instances are kept as such. They are known by their names; a
            field that is added later needs a default.
    """

    def __init__(self, *records: type) -> None:
        self._records: Mapping[str, type] = {record.__name__: record for record in records}

    def pack(self, value: object) -> bytes:
        """Bytes from which `unpack` makes the same value."""
        return msgpack.packb(
            value, default=self._other, strict_types=True, unicode_errors="surrogatepass"
        )

    def unpack(self, data: bytes) -> object:
        """The value of these bytes."""
        return msgpack.unpackb(
            data,
            ext_hook=self._known,
            strict_map_key=False,
            unicode_errors="surrogatepass",
        )

    def _other(self, value: object) -> object:
        """What msgpack does not know, as something that it does."""
        if isinstance(value, tuple) and type(value) is tuple:
            return msgpack.ExtType(TUPLE, self.pack(list(value)))
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return msgpack.ExtType(
                ARRAY, self.pack([value.dtype.str, list(value.shape), value.tobytes()])
            )
        name = type(value).__name__
        if self._records.get(name) is type(value) and dataclasses.is_dataclass(value):
            fields = {f.name: vars(value)[f.name] for f in dataclasses.fields(value)}
            return msgpack.ExtType(RECORD, self.pack([name, fields]))
        plain = _plain(value)
        return msgpack.ExtType(TEXT, self.pack(repr(value))) if plain is None else plain

    def _known(self, code: int, data: bytes) -> object:
        value = self.unpack(data)
        if code == TUPLE and isinstance(value, list):
            return tuple(value)
        if code == TEXT and isinstance(value, str):
            return value
        if code == ARRAY and isinstance(value, list):
            dtype, shape, raw = value
            return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()
        if code == RECORD and isinstance(value, list):
            name, fields = value
            if name in self._records:
                return self._records[name](**fields)
        raise ValueError(f"a value of kind {code} that this version does not know")


def _plain(value: object) -> object:
    """Numbers of numpy and subclasses of plain types as the plain ones; None for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else None
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, list):
        return list(value)
    return dict(value) if isinstance(value, dict) else None
