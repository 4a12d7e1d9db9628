"""Rows of text files (JSON lines, JSON, CSV), read one after the other."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from cohort.rewards.task import TaskError

UTF8_MARK = b"\xef\xbb\xbf"
# The longer mark first: it begins with the shorter one.
OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
NUMBERS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
# A field of a CSV file may be a whole document.
csv.field_size_limit(1 << 30)
_decoder = json.JSONDecoder(parse_constant=NUMBERS.__getitem__)
BLANK = re.compile(r"[ \t\n\r]*")
# A list is read in pieces of so many characters.
JSON_CHARACTERS = 1 << 20

# (line or row number, the row) of every row of a file.
Rows = Iterator[tuple[str, object]]


def as_utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """The stream in UTF-8, where a mark at its start tells that it is in UTF-16 or UTF-32."""
    start = stream.peek(4)[:4]
    for mark, encoding in OTHER_MARKS.items():
        if start.startswith(mark):
            text = stream.read().decode(encoding)
            return io.BufferedReader(io.BytesIO(text.encode()))
    return stream


def json_lines(stream: io.BufferedReader, file: Path) -> Rows:
    """One JSON value a line; blank lines are skipped.

    Raises:
        TaskError: A line is not JSON.
    """
    for number, line in enumerate(stream, start=1):
        if line.startswith(UTF8_MARK):
            line = line[len(UTF8_MARK) :]
        if not line.isspace():
            try:
                yield f"line{number}", _decoder.decode(line.decode())
            except UnicodeDecodeError as error:
                raise TaskError(
                    f"{file}:{number}: not a line of JSON: {_not_utf8(error)}"
                ) from error
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{file}:{number}: not a line of JSON: {error}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 ({error})"


def json_rows(stream: io.BufferedReader, file: Path) -> Rows:
    """A list of objects; or JSON lines, which many files of this name hold.

    Raises:
        TaskError: The file is neither.
    """
    start = stream.peek(1000).removeprefix(UTF8_MARK).lstrip()
    if not start.startswith(b"["):
        yield from json_lines(stream, file)
        return
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            for number, row in enumerate(_items(text), start=1):
                yield f"row{number}", row
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: not a list in JSON: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        raise TaskError(f"{file}: not a list in JSON: {error.msg} (in row {number + 1})") from error
    except RecursionError as error:
        raise TaskError(f"{file}: not a list in JSON: row {number + 1}: {error}") from error


def _items(stream: io.TextIOWrapper) -> Iterator[object]:
    """The items of a JSON list, one after the other: the whole may be larger than the memory."""
    text = stream.read(JSON_CHARACTERS)
    at, whole = text.index("[") + 1, False
    first = True
    while True:
        # A number goes on where the text is cut; so an item counts once something follows it.
        try:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                break
            if not first:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                after = _skip(text, at + 1)
            else:
                after = at
            item, end = _decoder.raw_decode(text, after)
            if end == len(text):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError:
            if whole:
                raise
            more = stream.read(max(JSON_CHARACTERS, len(text) - at))
            text, at, whole = text[at:] + more, 0, not more
            continue
        yield item
        at, first = end, False
    rest = text[at + 1 :] + stream.read(1000)
    if rest.strip():
        raise json.JSONDecodeError("Extra data", rest, 0)


def _skip(text: str, at: int) -> int:
    """Where the next character is that is not whitespace."""
    match = BLANK.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()


def csv_rows(stream: io.BufferedReader, file: Path) -> Rows:
    """Rows with the names of the first line; every value is a text.

    Raises:
        TaskError: The file is not CSV, or a row has another number of fields.
    """
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names) or "" in names:
                raise TaskError(f"{file}:1: every column needs a name of its own: {names}")
            for values in reader:
                if not values:
                    continue
                if len(values) != len(names):
                    raise TaskError(
                        f"{file}:{reader.line_num}: {len(values)} fields, and {len(names)} columns"
                    )
                yield f"line{reader.line_num}", dict(zip(names, values, strict=True))
        except UnicodeDecodeError as error:
            raise TaskError(f"{file}:{reader.line_num + 1}: not CSV: {_not_utf8(error)}") from error
        except csv.Error as error:
            raise TaskError(f"{file}:{reader.line_num}: not CSV: {error}") from error
