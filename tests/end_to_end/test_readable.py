"""Every artifact is plain Parquet that other tools read."""

from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cpo_pipe.data.schemas import TABLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from tests.support.pairs import pairs, write_jsonl

VALUES = {pa.string(): "x", pa.int32(): 1, pa.int64(): 2, pa.float64(): 0.5, pa.bool_(): True}


def test_prepared_examples_are_read_by_datasets(tmp_path: Path, tiny_model: Path) -> None:
    source = str(write_jsonl(tmp_path / "rows.jsonl", pairs(9)))
    artifact = prepare(Pairs(source=source, tokenizer=str(tiny_model), test=2), Store(tmp_path / "store")).artifact
    files = sorted(path.name for path in artifact.path.glob("*.parquet"))
    assert files == ["examples.parquet"], "a table of no rejected rows is one that datasets cannot read"
    for file in files:
        load_dataset("parquet", data_files=str(artifact.path / file), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", TABLES)
def test_read_by_datasets_pandas_and_duckdb(kind: str, tmp_path: Path) -> None:
    rows = Store(tmp_path / "store").rows(kind, {"a": 1})
    candidate = {"candidate_id": "c", "text": "t", "token_ids": [1], "strategy": "s", "similarity": None, "rank": None}
    nested = {"candidates": [candidate], "prompt_ids": [1, 2], "token_ids": [3]}
    row = {field.name: nested.get(field.name) or VALUES[field.type] for field in rows.schema}
    with rows.writer() as writer:
        writer.add([row])
    (shard,) = rows.files()
    # With the shards, not the folder: an unrecorded file must never be read.
    loaded = load_dataset("parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 1
    assert loaded.column_names == rows.schema.names
    assert pd.read_parquet(shard).shape == (1, len(rows.schema))
    assert duckdb.sql(f"select example_id from '{shard}'").fetchall() == [("x",)]
    assert all(b"doc" in field.metadata for field in pq.read_schema(shard)), "columns carry their meaning"
