"""Rows of Arrow tables (parquet, Hugging Face datasets) as values that JSON has a form for."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cohort.rewards.task import TaskError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 2000


def parquet_rows(file: Path, without: Collection[str]) -> Iterator[tuple[str, object]]:
    """The rows of a parquet file.

    Args:
        file: The file.
        without: Columns that may have any type: they are left out later.

    Yields:
        The row's number as `row3`, and the row.

    Raises:
        TaskError: The file cannot be read, or a value has no form in JSON.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = table.iter_batches(batch_size=BATCH_ROWS)
            yield from arrow_rows(batches, str(file), without)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{file}: cannot be read as parquet: {error}") from error


def arrow_rows(
    batches: Iterable[pyarrow.RecordBatch], source: str, without: Collection[str]
) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of Arrow's batches, as plain values (see `plain`).

    Args:
        batches: Of a table, in order.
        source: Where they are from, for errors.
        without: Columns that may have any type: they are left out later.

    Yields:
        The row's number as `row3`, and the row.

    Raises:
        TaskError: A value has no form in JSON, or two columns have one name.
    """
    number = 0
    for batch in batches:
        names = batch.schema.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise TaskError(f"{source}: a column needs a name of its own: '{twice[0]}'")
        special = [
            field.name
            for field in batch.schema
            if field.name not in without and not _is_plain(field.type)
        ]
        columns = [
            _values(batch.column(name), name, source, number, name in without) for name in names
        ]
        for values in zip(*columns, strict=True):
            number += 1
            row = dict(zip(names, values, strict=True))
            for name in special:
                row[name] = _plain_column(row[name], name, f"{source}:{number}")
            yield f"row{number}", row


def _values(
    column: pyarrow.Array, name: str, source: str, rows_before: int, left_out: bool
) -> list[object]:
    """The column's values; None for what Python cannot hold, where it is left out later."""
    # Dates beyond the year 9999, unknown time zones, texts that are not UTF-8.
    errors = (ValueError, ArithmeticError, LookupError, NotImplementedError)
    try:
        return list(column.to_pylist())
    except errors:
        values: list[object] = []
        for number, item in enumerate(column, rows_before + 1):
            try:
                values.append(item.as_py())
            except errors as error:
                if not left_out:
                    raise TaskError(
                        f"{source}:{number}: the column '{name}' ({column.type}) holds a value "
                        f"that cannot be read: {error}; to leave it out: task.options.columns: "
                        f"{{{name}: null}}"
                    ) from error
                values.append(None)
        return values


def _is_plain(kind: pyarrow.DataType) -> bool:
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


def _plain_column(value: object, name: str, where: str) -> object:
    try:
        return plain(value)
    except TypeError as error:
        raise TaskError(
            f"{where}: the column '{name}' holds {error}; to leave it out: "
            f"task.options.columns: {{{name}: null}}"
        ) from error


def plain(value: object) -> object:
    """The value as JSON holds it: arrays are lists, dates ISO texts, a missing number (NaN) None.

    Raises:
        TypeError: The value has no such form, like an image; the message names its type.
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
