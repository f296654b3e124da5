"""Rows of Parquet files and other Arrow data."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import cause
from cpo_pipe.data.sources.rows import ColumnRequest, Refusal, Row, Stream, Unreadable

READ_AT_ONCE = 1024
"""Rows of a batch."""


def open_parquet(path: Path, request: ColumnRequest) -> Any:
    """Return an open Parquet file.

    Raises:
        InputError: it is not a Parquet file.
    """
    try:
        file = pq.ParquetFile(path)
        file.schema_arrow.names  # noqa: B018 - an error where a name is not UTF-8
        return file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise request.error(f"not a Parquet file ({cause(error)})") from error


def read_parquet(path: Path, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a Parquet file.

    Raises:
        InputError: a required column is missing, a requested one is duplicate, or the file is damaged.
    """
    parquet = open_parquet(path, request)
    schema = parquet.schema_arrow
    columns = request.select(schema.names)
    yield from read_batches(label, parquet.iter_batches(READ_AT_ONCE, columns=columns), class_names(schema), request)


def read_batches(
    label: str, batches: Iterable[Any], classes: Mapping[str, Sequence[str]], request: ColumnRequest
) -> Stream:
    """Yield the rows of Arrow record batches or tables.

    Args:
        label: the file or split, for the rows' places.
        batches: read one after the other.
        classes: names of the classes in integer columns, by column.
        request: names the source in messages.

    Raises:
        InputError: a part of the file is damaged.
    """
    number = 0
    try:
        for batch in batches:
            columns = {column: values(batch.column(column)) for column in batch.schema.names}
            for column in classes.keys() & columns.keys():
                columns[column] = [class_name(value, classes[column]) for value in columns[column]]
            for index in range(batch.num_rows):
                number += 1
                row = {column: found[index] for column, found in columns.items()}
                bad = next((column for column, value in row.items() if isinstance(value, Unreadable)), None)
                place = f"{label}:{number}"
                yield Row(place, row) if bad is None else Refusal(place, row[bad].reason, f"column {bad}")
    except (OSError, pa.ArrowException) as error:
        raise request.error(f"damaged after row {number:,} ({cause(error)}); write the file again") from error


def values(column: Any) -> list[Any]:
    """Return the values of an Arrow column; text that is not UTF-8 has surrogates for the bytes, as in CSV."""
    try:
        found = list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # such as bytes that are not UTF-8, or the year 10,000
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            raw = column.cast(pa.large_binary()).to_pylist()
            return [value if value is None else value.decode(errors="surrogateescape") for value in raw]
        found = list(map(_value, column))
    decode = _json_decoder(column.type)
    return found if decode is None else [value if isinstance(value, Unreadable) else decode(value) for value in found]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, OverflowError, pa.ArrowException):
        return Unreadable("not text")


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return what decodes the JSON texts in values of a type, as `datasets` keeps mixed values; None if it has none."""
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        decode = _json_decoder(kind.value_type)
        return decode and (lambda items: items and [decode(item) for item in items])
    if pa.types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _json_decoder(field.type)) is not None}
        decoded = lambda row: row and {**row, **{name: fields[name](row[name]) for name in fields}}  # noqa: E731
        return decoded if fields else None
    return None


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes in columns of type ClassLabel, by column, as `datasets` records them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: feature for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {name: list(map(str, feature["names"])) for name, feature in kinds.items()}
    except (KeyError, ValueError, TypeError, AttributeError):  # of another version, or none
        return {}


def class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class; None for -1, which means no class."""
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
