"""Rows of data files and Hugging Face datasets, as plain values, each with the place it is from.

Rows are read one after the other, and none is kept here: data may be larger than the memory.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl

from cohort.rewards.arrow import BATCH_ROWS, arrow_rows, parquet_rows
from cohort.rewards.progress import with_progress
from cohort.rewards.task import TaskError
from cohort.rewards.text_files import Rows, as_utf8, csv_rows, json_lines, json_rows

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
DATASET_OPTIONS = ("config", "split", "revision")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Record(NamedTuple):
    """One row.

    Attributes:
        file: Where it is from.
        place: Its line or row there, like `line3`.
        id: Unique among the rows read together.
        values: Its columns.
    """

    file: str
    place: str
    id: str
    values: dict[str, object]

    @property
    def where(self) -> str:
        """Its file and number, for errors."""
        return f"{self.file}:{self.place.removeprefix('line').removeprefix('row')}"


def read_records(
    location: str, key: str, split: str, without: Collection[str] = ()
) -> Iterator[Record]:
    """The rows of a file, of the files that a glob names, of a folder, or of a dataset by its id.

    Reading that takes more than a few seconds prints its progress to stderr.

    Args:
        location: After a folder or an id, `?config=...&split=...&revision=...` may follow.
        key: The config key that has the location, named in errors.
        split: The split to read where the location has no `?split=`.
        without: Columns that are left out later, so their values may have any type.

    Raises:
        TaskError: Nothing is there, the kind of file is unknown, a file or row is damaged, there
            are no rows, or a library is missing.
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
    name = file.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    kind = Path(name.removesuffix(packed)).suffix
    if kind not in SUFFIXES or (packed and kind == ".parquet"):
        raise TaskError(
            f"{key}: {file} is of no known kind ({', '.join(SUFFIXES)}; "
            f"{', '.join(PACKED)} after all but parquet)"
        )
    _refuse_pointer(file, key)
    if kind == ".parquet":
        yield from parquet_rows(file, without)
        return
    reader: Callable[[io.BufferedReader, Path], Rows] = {
        ".jsonl": json_lines,
        ".json": json_rows,
        ".csv": csv_rows,
    }[kind]
    try:
        with _opened(file, packed) as stream:
            yield from reader(as_utf8(stream), file)
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
    match packed:
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(file))
        case ".bz2":
            return io.BufferedReader(bz2.BZ2File(file))
        case ".xz":
            return io.BufferedReader(lzma.LZMAFile(file))
    return file.open("rb")


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
            hint = "" if local else f"; and there is no file {path.absolute()}"
            raise TaskError(
                f"{key}={location}: {what} cannot be loaded: {type(error).__name__}: "
                f"{str(error)[:500]}{hint}"
            ) from error
        if not len(table):
            raise TaskError(f"{key}: {location} has no rows in its split {wanted}")
        batches = table.with_format("arrow").iter(batch_size=BATCH_ROWS)
        for place, values in arrow_rows(batches, f"{source} ({wanted})", without):
            yield Record(f"{source} ({wanted})", place, place, values)


def _load(source: str, split: str, options: dict[str, str], stack: ExitStack) -> datasets.Dataset:
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
    """Where `datasets` may keep what it prepares: None for its own folder if that is writable."""
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
