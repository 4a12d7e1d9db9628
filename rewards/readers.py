"""Rows of data files and Hugging Face datasets, as plain values, each with the place it is from."""

from __future__ import annotations

import csv
import datetime
import decimal
import glob
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

import numpy as np

from rewards.tasks import TaskError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
DATASET_OPTIONS = ("config", "split", "revision")
# A field of a CSV file may be a whole document.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Record:
    """One row. where: its file and number, for errors. id: unique among the rows read together."""

    where: str
    id: str
    values: dict[str, Any]


def read_records(location: str, key: str, split: str) -> list[Record]:
    """The rows of a file, of the files that a glob names, of a folder, or of a dataset by its id.

    location: for a folder or an id, `?config=...&split=...&revision=...` may follow. key: the
    config key that gave it, named in errors. split: the split without `?split=`.

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
        return _read_dataset(location, key, split)
    records: list[Record] = []
    for file in files:
        prefix = "" if len(files) == 1 else f"{file.name}:"
        if len({other.name for other in files}) < len(files):
            prefix = f"{file}:"
        before = len(records)
        for place, values in _read_file(file, key):
            where = f"{file}:{place.removeprefix('line').removeprefix('row')}"
            records.append(Record(where, prefix + place, plain_row(values, where)))
        if len(records) == before:
            raise TaskError(f"{key}: {file} has no rows")
    return records


# Files --------------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, Any]]


def _read_file(file: Path, key: str) -> Rows:
    """(line or row number, the row) of every row of a file."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2:-1] if packed else suffixes[-1:]
    if not kind or kind[0] not in SUFFIXES or (packed and kind[0] == ".parquet"):
        raise TaskError(
            f"{key}: {file} is of no known kind ({', '.join(SUFFIXES)}; .gz after all but parquet)"
        )
    if kind[0] == ".parquet":
        yield from _parquet(file)
        return
    reader: Callable[[Any, Path], Rows] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
    }[kind[0]]
    try:
        with gzip.open(file) if packed else file.open("rb") as stream:
            yield from reader(stream, file)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{key}: {file} cannot be read: {error}") from error


def _json_lines(stream: IO[bytes], file: Path) -> Rows:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield f"line{number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
                raise TaskError(f"{file}:{number}: not a line of JSON: {error}") from error


def _json(stream: IO[bytes], file: Path) -> Rows:
    """A list of objects; or JSON lines, which many files of this name hold."""
    start = stream.read(1000).decode("utf-8-sig", errors="ignore").lstrip()
    stream.seek(0)
    if not start.startswith("["):
        yield from _json_lines(stream, file)
        return
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{file}: not a list in JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"row{number}", row


def _csv(stream: IO[bytes], file: Path) -> Rows:
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
        except (csv.Error, UnicodeDecodeError) as error:
            raise TaskError(f"{file}:{reader.line_num}: not CSV: {error}") from error


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{file}: cannot be read as parquet: {error}") from error


# Hugging Face datasets ----------------------------------------------------------------------------


def _read_dataset(location: str, key: str, split: str) -> list[Record]:
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
    looks_like_a_file = path.name.lower().removesuffix(".gz").endswith(SUFFIXES)
    if not path.is_dir() and (looks_like_a_file or not HUB_ID.fullmatch(name)):
        raise TaskError(f"{key}: no file at {path.absolute()}")
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{key}={location}: reading a folder or a dataset of the hub needs datasets: "
            "pip install datasets"
        ) from error
    source = str(path) if path.is_dir() else name
    wanted = options.get("split", split)
    try:
        if path.is_dir() and (path / "state.json").is_file():
            table = datasets.load_from_disk(source)
        elif path.is_dir() and (path / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(source)[wanted]
        else:
            revision = {"revision": options["revision"]} if "revision" in options else {}
            table = datasets.load_dataset(source, options.get("config"), split=wanted, **revision)
    # `datasets` and the hub's client raise errors of many kinds.
    except Exception as error:
        what = (
            f"the folder {path.absolute()}" if path.is_dir() else f"the dataset {name} of the hub"
        )
        hint = "" if path.is_dir() else f"; nor is there a file {path.absolute()}"
        raise TaskError(
            f"{key}={location}: {what} cannot be loaded: {type(error).__name__}: "
            f"{str(error)[:500]}{hint}"
        ) from error
    records = []
    for number, row in enumerate(table, start=1):
        where = f"{source} ({wanted}):{number}"
        records.append(Record(where, f"row{number}", plain_row(row, where)))
    if not records:
        raise TaskError(f"{key}: {location} has no rows in its split {wanted}")
    return records


# Values -------------------------------------------------------------------------------------------


def plain_row(row: Any, where: str) -> dict[str, Any]:
    """The row with values as JSON holds them; raises TaskError for what has no such form."""
    if not isinstance(row, dict):
        raise TaskError(f"{where}: a row must be an object, not a {type(row).__name__}")
    values = {}
    for name, value in row.items():
        try:
            values[str(name)] = plain(value)
        except TypeError as error:
            raise TaskError(
                f"{where}: the column '{name}' holds {error}; to leave it out: "
                f"task.options.columns: {{{name}: null}}"
            ) from error
    return values


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
