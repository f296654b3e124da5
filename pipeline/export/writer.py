"""Preference data as Parquet files of a bounded size, named as the Hugging Face hub expects them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 100_000
"""A file is closed once it has this many."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def pair_schema(conversational: bool) -> pa.Schema:
    """Return the schema of preference data, with texts as strings or as messages."""
    text = _MESSAGES if conversational else pa.string()
    return pa.schema(
        [
            ("prompt", text),
            ("chosen", text),
            ("rejected", text),
            ("example_id", pa.string()),
            ("chosen_strategy", pa.string()),
            ("rejected_strategy", pa.string()),
            ("similarity", pa.float32()),
        ]
    )


class PairWriter:
    """Writes rows to `train-00000.parquet` and so on in a new folder."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.schema, self.rows, self.num_bytes = schema, 0, 0
        self.files: list[Path] = []
        self._folder = folder
        self._writer: pq.ParquetWriter | None = None
        self._first = 0
        folder.mkdir()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows; a full file is closed."""
        if not rows:
            return
        if self._writer is None:
            self.files.append(self._folder / f"train-{len(self.files):05}.parquet")
            self._writer, self._first = pq.ParquetWriter(self.files[-1], self.schema), self.rows
        table = pa.Table.from_pylist(rows, schema=self.schema)
        self._writer.write_table(table)
        self.rows += table.num_rows
        self.num_bytes += table.nbytes
        if self.rows - self._first >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
