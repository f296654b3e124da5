"""Rows of Parquet files and other Arrow data."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.sources.rows import Refusal, Row, Stream, duplicate, require

READ_AT_ONCE = 1024
"""Rows of a batch."""


def open_parquet(name: str) -> Any:
    """Return an open Parquet file.

    Raises:
        InputError: it is not a Parquet file.
    """
    try:
        file = pq.ParquetFile(name)
        file.schema_arrow.names  # noqa: B018 - an error where a name is not UTF-8
        return file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"data.source {name}: not a Parquet file ({cause(error)})") from error


def read_parquet(name: str, required: Mapping[str, str], wanted: Sequence[str]) -> Stream:
    """Yield the rows of a Parquet file, with the `wanted` columns that it has.

    Raises:
        InputError: a required column is missing, a wanted one is duplicate, or the file is damaged.
    """
    parquet = open_parquet(name)
    schema = parquet.schema_arrow
    require(name, required, schema.names)
    there = [column for column in schema.names if column in wanted]
    if twice := duplicate(there):
        raise InputError(f"data.source {name}: has two columns named {twice!r}; rename or remove one")
    return read_batches(name, Path(name).name, parquet.iter_batches(READ_AT_ONCE, columns=there), schema)


def read_batches(source: str, name: str, batches: Iterable[Any], schema: pa.Schema) -> Stream:
    """Yield the rows of Arrow record batches or tables.

    Args:
        source: the data source, for messages.
        name: the file or split, for the rows' labels.
        batches: read one after the other.
        schema: its metadata may have the class names of integer columns.

    Raises:
        InputError: a part of the file is damaged.
    """
    classes = _class_names(schema)
    number = 0
    try:
        for batch in batches:
            columns = {column: values(batch.column(column)) for column in batch.schema.names}
            for column in classes.keys() & columns.keys():
                columns[column] = [_class_name(value, classes[column]) for value in columns[column]]
            for index in range(batch.num_rows):
                number += 1
                row = {column: found[index] for column, found in columns.items()}
                bad = next((column for column, value in row.items() if isinstance(value, Unreadable)), None)
                label = f"{name}:{number}"
                yield Row(label, row) if bad is None else Refusal(label, row[bad].reason, f"column {bad}")
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"data.source {source}: damaged after row {number:,} ({cause(error)}); write the file again"
        ) from error


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch as mappings from column to value; see `values`."""
    names = batch.schema.names
    for row in zip(*map(values, batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a value that Python cannot hold."""

    reason: str


def values(column: Any) -> list[Any]:
    """Return the values of an Arrow column; text that is not UTF-8 has surrogates for the bytes, as in CSV."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # such as bytes that are not UTF-8, or the year 10,000
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            raw = column.cast(pa.large_binary()).to_pylist()
            return [value if value is None else value.decode(errors="surrogateescape") for value in raw]
        return list(map(_value, column))


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, OverflowError, pa.ArrowException):
        return Unreadable("not text")


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes in columns of type ClassLabel, by column, as `datasets` records them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: feature for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {name: list(map(str, feature["names"])) for name, feature in kinds.items()}
    except (KeyError, ValueError, TypeError, AttributeError):  # of another version, or none
        return {}


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class; None for -1, which means no class."""
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
