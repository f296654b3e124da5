"""Rows of a source, checked by all rules that need no tokenizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.sources.rows import Refusal, Row, text_fault
from cpo_pipe.data.sources.source import Source
from cpo_pipe.pipeline.prepare.base import Data, Texts

T = TypeVar("T")


def read_rows(
    config: Data,
    source: Source,
    drawn: NDArray[np.bool_] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Texts | Refusal]:
    """Yield what the rows hold, in the order of the source.

    Args:
        config: the section.
        source: its source.
        drawn: whether to take each row; None: all.
        advance: takes the number of rows that were read.

    Raises:
        InputError: a required column is missing.
    """
    required, optional = config.columns_read
    for number, row in enumerate(source.read(required, optional, config.max_rows)):
        if drawn is not None and not drawn[number]:
            continue
        if isinstance(row, Refusal):
            yield row
        else:
            yield from config.texts(row)
        advance(1)


def check_texts(row: Row, columns: Mapping[str, str | None]) -> dict[str, str] | Refusal:
    """Return the texts of a row by the key of `data.columns` that names their column, or the rule that it breaks."""
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
    return texts


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
