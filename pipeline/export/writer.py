"""Preference data as Parquet files of a bounded size, named as the Hugging Face hub expects them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.models.chat import to_json

ROWS_PER_FILE = 100_000
"""A file is closed once it has this many."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
JSON_MESSAGES = pa.list_(pa.json_())
"""Messages with other keys, such as calls of tools: a struct would have all keys of all messages in each of them."""


def pair_schema(text: pa.DataType, tools: bool = False, settings: bool = False) -> pa.Schema:
    """Return the schema of preference data.

    Args:
        text: type of prompts and completions: strings, `MESSAGES` or `JSON_MESSAGES`.
        tools: with a column of tools, as JSON.
        settings: with a column of arguments of the chat template.
    """
    return pa.schema(
        [
            ("prompt", text),
            ("chosen", text),
            ("rejected", text),
            *([("tools", pa.string())] if tools else []),
            *([("chat_template_kwargs", pa.json_())] if settings else []),
            ("example_id", pa.string()),
            ("chosen_strategy", pa.string()),
            ("rejected_strategy", pa.string()),
            ("similarity", pa.float32()),
        ]
    )


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return a column; Arrow makes JSON of texts only."""
    if kind == JSON_MESSAGES:
        return pa.array([[*map(to_json, messages)] for messages in values], pa.list_(pa.string())).cast(kind)
    if kind == pa.json_():
        return pa.array([*map(to_json, values)], pa.string()).cast(kind)
    return pa.array(values, kind)


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
        columns = [_column([row[field.name] for row in rows], field.type) for field in self.schema]
        table = pa.Table.from_arrays(columns, schema=self.schema)
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
