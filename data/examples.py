"""Prepared ground-truth pairs: the artifact that `prepare` makes and every later stage reads."""

import hashlib
import heapq
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Artifact


@dataclass(frozen=True)
class Examples:
    """The examples of a run, and what their token ids depend on."""

    artifact: Artifact
    """Folder with examples.parquet, tokenizer/ and, where rows were refused, rejected.parquet."""
    tokenizer: TokenizerFiles
    rendering: Spec
    """The fields that determine an example's token ids: template with its settings, tokenizer, where text is cut."""

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end targets, the most frequent first."""
        return list(self.artifact.manifest["end_tokens"])

    @property
    def most_rejected(self) -> int:
        """The most rejected answers that an example has."""
        return int(self.artifact.manifest["most_rejected"])

    @property
    def leakage(self) -> list[dict[str, Any]]:
        """The overlap of held-out examples with training examples: rows of LEAKAGE."""
        return list(self.artifact.manifest["leakage"])

    def read(self, split: str, limit: int | None = None, columns: list[str] | None = None) -> pa.Table:
        """Return the split's selection, in its fixed order: the first `limit` examples of the EXAMPLES schema."""
        # Filtered batch by batch: other splits are never in memory.
        path, in_split = self.artifact.path / "examples.parquet", pc.field("split") == split
        table = pq.read_table(path, columns=columns, filters=in_split)
        return table if limit is None else table.slice(0, limit)

    def count(self, split: str) -> int:
        """Return the number of examples in a split."""
        return int(self.read(split, columns=["example_id"]).num_rows)


def draw(examples: pa.Table, count: int, seed: int) -> pa.Table:
    """Return `count` examples drawn by a seed, in their order: those whose ids hash lowest with it.

    The draw does not depend on the order of the source, and a larger draw contains the smaller ones.
    """
    ids = enumerate(examples["example_id"].to_pylist())
    lowest = heapq.nsmallest(count, ((digest(["draw", seed, example_id]), row) for row, example_id in ids))
    return examples.take(pa.array(sorted(row for _, row in lowest), pa.int64()))


def largest_token_id(examples: Examples) -> int:
    """Return the largest token id in prompts and targets."""
    largest = 0
    with pq.ParquetFile(examples.artifact.path / "examples.parquet") as file:
        for batch in file.iter_batches(columns=["prompt_ids", "target_ids"]):
            largest = max(largest, *(pc.max(pc.list_flatten(column)).as_py() for column in batch.columns))
    return largest


def selection_hash(examples: pa.Table) -> str:
    """Return the identity of an ordered selection: its ids and token ids (ids alone do not say where text was cut)."""
    parts = []
    for name in ("example_id", "prompt_ids", "target_ids"):
        # Of all rows one after the other: how they are chunked must not matter.
        lengths, values = hashlib.sha256(), hashlib.sha256()
        for chunk in examples[name].chunks:
            if pa.types.is_list(chunk.type):
                lengths.update(pc.list_value_length(chunk).to_numpy().tobytes())
                values.update(pc.list_flatten(chunk).to_numpy().tobytes())
            else:
                lengths.update(pc.binary_length(chunk).to_numpy().tobytes())
                values.update("".join(chunk.to_pylist()).encode())
        parts.append([name, lengths.hexdigest(), values.hexdigest()])
    return digest(parts)
