"""Rows of a source, checked by all rules that need no tokenizer."""

from collections.abc import Iterable, Iterator
from datetime import date
from decimal import Decimal
from itertools import islice
from typing import TypeVar

from cpo_pipe.data.sources.rows import Refusal, Row, text_fault
from cpo_pipe.data.sources.source import Source
from cpo_pipe.pipeline.prepare.base import Data, Texts

T = TypeVar("T")


def read_rows(config: Data, source: Source) -> Iterator[Texts | Refusal]:
    """Yield the rows in the order of the source.

    Raises:
        InputError: a column is missing. Those with prompts and targets must be there, and those that the user names.
    """
    named = {field: column for field, column in config.columns.model_dump().items() if column is not None}
    must = {"prompt", "target"} | config.columns.model_fields_set
    required = {field: column for field, column in named.items() if field in must}
    optional = [column for field, column in named.items() if field not in must]
    for row in source.read(required, optional, config.max_rows):
        yield row if isinstance(row, Refusal) else check_row(row, config)


def count_rows(config: Data, source: Source) -> int:
    """Count the rows that will be read."""
    count = source.count(config.max_rows)
    return count if config.max_rows is None else min(count, config.max_rows)


def check_row(row: Row, config: Data) -> Texts | Refusal:
    """Return the texts of a row, or the rule that it breaks."""
    columns = config.columns.model_dump()
    texts: dict[str, str] = {}
    for field, column in columns.items():
        name = f"column {column} (data.columns.{field})"
        value = row.values.get(column) if column is not None else None
        if value is None and field not in ("prompt", "target"):
            continue
        if field == "category" and isinstance(value, int | float | Decimal | date):
            value = str(value)
        if fault := text_fault(value, name):
            return Refusal(row.source, *fault)
        texts[field] = str(value)
    for field in ("prompt", "target"):
        if field in texts and not texts[field].strip():
            return Refusal(
                row.source, f"empty {field}", f"column {columns[field]} (data.columns.{field}) is {texts[field]!r}"
            )
    category = texts.get("category") or None
    return Texts(row.source, texts.get("prompt", ""), texts.get("context", ""), texts["target"], category)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
