"""Many rows in little memory: one after the other in a file that nobody else sees."""

from __future__ import annotations

import hashlib
import io
import json
import marshal
import os
import re
import tempfile
from array import array
from typing import Any

# So many bytes stay in memory: small data need no file.
KEPT_BYTES = 32 << 20
# Much faster than JSON, and read by this process only. The last version in which equal values have
# equal bytes.
VERSION = 2
# What half a surrogate looks like in it; lengths and numbers may look like this too.
SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")


class RowStore:
    """Values that JSON has a form for, by number. Read by any number of threads once filled."""

    def __init__(self) -> None:
        self._ends = array("q", [0])
        self._recent = bytearray()
        self._file: io.FileIO | None = None
        self._written = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def append(self, value: Any) -> None:
        """Add a value after the others.

        Raises:
            UnicodeEncodeError: It holds half a surrogate.
            ValueError: It is nested too deep.
            OSError: The folder for temporary files is full.
        """
        data = marshal.dumps(value, VERSION)
        if b"\xed" in data and SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        self._digest.update(data)
        self._recent += data
        self._ends.append(self._ends[-1] + len(data))
        if len(self._recent) > KEPT_BYTES:
            self._flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        if start >= self._written:
            data = bytes(self._recent[start - self._written : end - self._written])
        else:
            assert self._file is not None  # what was written is in it
            data = os.pread(self._file.fileno(), end - start, start)
        return marshal.loads(data)

    def digest(self) -> str:
        """A fingerprint of all values in their order."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._file is None:
            # Without a name: gone with the process, however it ends.
            self._file = tempfile.TemporaryFile(prefix="cohort-rows-", buffering=0)  # noqa: SIM115
        view = memoryview(self._recent)
        while view:
            view = view[self._file.write(view) :]
        view.release()
        self._written += len(self._recent)
        self._recent = bytearray()
