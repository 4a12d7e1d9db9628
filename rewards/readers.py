"""Rows of data files and Hugging Face datasets, as plain values, each with the place it is from.

Rows are read one after the other, and none is kept here: data may be larger than the memory.
"""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import glob
import gzip
import io
import json
import lzma
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from cohort.rewards.progress import with_progress
from cohort.rewards.task import TaskError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
DATASET_OPTIONS = ("config", "split", "revision")
BATCH_ROWS = 2000
UTF8_MARK = b"\xef\xbb\xbf"
# The longer mark first: it begins with the shorter one.
OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
NUMBERS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
# A field of a CSV file may be a whole document.
csv.field_size_limit(1 << 30)
_decoder = json.JSONDecoder(parse_constant=NUMBERS.__getitem__)
BLANK = re.compile(r"[ \t\n\r]*")
# A list is read in pieces of so many characters.
JSON_CHARACTERS = 1 << 20


class Record(NamedTuple):
    """One row. file, place: where it is from; id: unique among the rows read together."""

    file: str
    place: str
    id: str
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """Its file and number, for errors."""
        return f"{self.file}:{self.place.removeprefix('line').removeprefix('row')}"


def read_records(
    location: str, key: str, split: str, without: Collection[str] = ()
) -> Iterator[Record]:
    """The rows of a file, of the files that a glob names, of a folder, or of a dataset by its id.

    location: for a folder or an id, `?config=...&split=...&revision=...` may follow. key: the
    config key that gave it, named in errors. split: the split without `?split=`. without: columns
    that nobody will read, so their values may be anything. A line on stderr tells how far it is
    where that takes more than a few seconds.

    Raises TaskError: nothing there, a kind of file that is not known, a damaged file or row, no
    rows, a library that is missing.
    """
    path = Path(os.path.expandvars(location)).expanduser()
    if path.is_file():
        files = [path]
    elif glob.has_magic(str(path).partition("?")[0]):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise TaskError(f"{key}: no file matches {path}")
    else:
        return with_progress(_read_dataset(location, key, split, without), f"reading {location}")
    return with_progress(_read_files(files, key, without), f"reading {location}")


# Files --------------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, Any]]


def _read_files(files: list[Path], key: str, without: Collection[str]) -> Iterator[Record]:
    several_alike = len({file.name for file in files}) < len(files)
    for file in files:
        prefix = "" if len(files) == 1 else f"{file if several_alike else file.name}:"
        name = str(file)
        empty = True
        for place, values in _read_file(file, key, without):
            empty = False
            if not isinstance(values, dict):
                where = Record(name, place, "", {}).where
                raise TaskError(f"{where}: a row must be an object, not a {type(values).__name__}")
            yield Record(name, place, prefix + place, values)
        if empty:
            raise TaskError(f"{key}: {file} has no rows")


def _read_file(file: Path, key: str, without: Collection[str]) -> Rows:
    """(line or row number, the row) of every row of a file."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1] if suffixes and suffixes[-1] in PACKED else ""
    kind = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    if kind[0] not in SUFFIXES or (packed and kind[0] == ".parquet"):
        raise TaskError(
            f"{key}: {file} is of no known kind ({', '.join(SUFFIXES)}; "
            f"{', '.join(PACKED)} after all but parquet)"
        )
    _refuse_pointer(file, key)
    if kind[0] == ".parquet":
        yield from _parquet(file, without)
        return
    reader: Callable[[io.BufferedReader, Path], Rows] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
    }[kind[0]]
    try:
        with _opened(file, packed) as stream:
            yield from reader(_as_utf8(stream), file)
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        raise TaskError(f"{key}: {file} cannot be read: {error}") from error


def _refuse_pointer(file: Path, key: str) -> None:
    """Git LFS leaves a small text in place of a file that it has not fetched."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise TaskError(f"{key}: {file} cannot be read: {error}") from error
    if start == LFS_POINTER:
        raise TaskError(
            f"{key}: {file} is a pointer of Git LFS, not the data itself: run `git lfs pull` in "
            "its repository"
        )


def _opened(file: Path, packed: str) -> io.BufferedReader:
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = openers.get(packed, open)
    return opener(file, "rb")


def _as_utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """The same, where a mark at the start says that the text is in UTF-16 or UTF-32."""
    start = stream.peek(4)[:4]
    for mark, encoding in OTHER_MARKS.items():
        if start.startswith(mark):
            text = stream.read().decode(encoding)
            return io.BufferedReader(io.BytesIO(text.encode()))
    return stream


def _json_lines(stream: io.BufferedReader, file: Path) -> Rows:
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


def _json(stream: io.BufferedReader, file: Path) -> Rows:
    """A list of objects; or JSON lines, which many files of this name hold."""
    start = stream.peek(1000).removeprefix(UTF8_MARK).lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(stream, file)
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


def _items(stream: io.TextIOWrapper) -> Iterator[Any]:
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
    """Where the next character is that is no whitespace."""
    match = BLANK.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()


def _csv(stream: io.BufferedReader, file: Path) -> Rows:
    """Rows with the names of the first line; every value is a text."""
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


def _parquet(file: Path, without: Collection[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = table.iter_batches(batch_size=BATCH_ROWS)
            yield from _arrow_rows(batches, str(file), without)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{file}: cannot be read as parquet: {error}") from error


def _arrow_rows(batches: Iterable[Any], source: str, without: Collection[str]) -> Rows:
    """The rows of Arrow's batches; values that JSON has no form for become plain, or an error."""
    number = 0
    for batch in batches:
        special = [
            field.name
            for field in batch.schema
            if field.name not in without and not _is_plain(field.type)
        ]
        for row in batch.to_pylist():
            number += 1
            for name in special:
                row[name] = _plain_column(row[name], name, f"{source}:{number}")
            yield f"row{number}", row


def _is_plain(kind: Any) -> bool:
    """Whether every value of this Arrow type is one of JSON's as it is (not NaN, for example)."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )


# Hugging Face datasets ----------------------------------------------------------------------------


def _read_dataset(
    location: str, key: str, split: str, without: Collection[str]
) -> Iterator[Record]:
    """A folder of data files, or a dataset of the hub, as `datasets` reads it."""
    name, _, query = location.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option, value in options.items():
        if option not in DATASET_OPTIONS or not value:
            raise TaskError(
                f"{key}={location}: after '?' come {', '.join(DATASET_OPTIONS)}, as in "
                "org/name?config=main&split=train"
            )
    path = Path(os.path.expandvars(name)).expanduser()
    bare = path.name.lower()
    for ending in PACKED:
        bare = bare.removesuffix(ending)
    if not path.is_dir() and (bare.endswith(SUFFIXES) or not HUB_ID.fullmatch(name)):
        raise TaskError(f"{key}: no file at {path.absolute()}")
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                _refuse_pointer(file, key)
    source = str(path) if path.is_dir() else name
    wanted = options.get("split", split)
    with ExitStack() as stack:
        try:
            table = _load(source, wanted, options, stack)
        except ImportError as error:
            raise TaskError(
                f"{key}={location}: reading a folder or a dataset of the hub needs datasets: "
                f"pip install datasets ({error})"
            ) from error
        # `datasets` and the hub's client raise errors of many kinds.
        except Exception as error:
            local = path.is_dir()
            what = f"the folder {path.absolute()}" if local else f"the dataset {name} of the hub"
            hint = "" if local else f"; nor is there a file {path.absolute()}"
            raise TaskError(
                f"{key}={location}: {what} cannot be loaded: {type(error).__name__}: "
                f"{str(error)[:500]}{hint}"
            ) from error
        place = None
        batches = table.with_format("arrow").iter(batch_size=BATCH_ROWS)
        for place, values in _arrow_rows(batches, f"{source} ({wanted})", without):
            yield Record(f"{source} ({wanted})", place, place, values)
    if place is None:
        raise TaskError(f"{key}: {location} has no rows in its split {wanted}")


def _load(source: str, split: str, options: dict[str, str], stack: ExitStack) -> Any:
    folder = Path(source)
    home = stack.enter_context(_writable_home())
    import datasets

    if (folder / "state.json").is_file():
        return datasets.load_from_disk(source)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(source)[split]
    given = {"revision": options["revision"]} if "revision" in options else {}
    if home is not None:
        given["cache_dir"] = home
    return datasets.load_dataset(source, options.get("config"), split=split, **given)


@contextmanager
def _writable_home() -> Iterator[str | None]:
    """Where `datasets` may keep what it prepares: None for its own folder, if it can write there.

    Else a folder that is gone afterwards, so that a home that is read-only or missing does not
    stop a run.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        with tempfile.TemporaryDirectory(prefix="cohort-datasets-") as passing:
            yield passing
        return
    yield None


# Values -------------------------------------------------------------------------------------------


def _plain_column(value: Any, name: str, where: str) -> Any:
    try:
        return plain(value)
    except TypeError as error:
        raise TaskError(
            f"{where}: the column '{name}' holds {error}; to leave it out: "
            f"task.options.columns: {{{name}: null}}"
        ) from error


def plain(value: Any) -> Any:
    """The value as JSON holds it: arrays are lists, dates ISO texts, a missing number (NaN) None.

    Raises TypeError that names a type without such a form, like images.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")
