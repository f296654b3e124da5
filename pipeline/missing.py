"""Which samples of a run's examples are not there yet, and how they are made and kept."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.executor import Executor, Work
from cpo_pipe.data.store import Rows

WINDOW = 1024
"""Examples whose items are sorted together."""

LOOKED_UP_TOGETHER = 1 << 20
"""Samples that are looked for among the refused together: their keys are texts."""

SAMPLE_INDICES = "sample_indices"
"""The column of a batch that says which samples of each example are missing."""


@dataclass(frozen=True)
class Wanted:
    """Samples 0 … n − 1 of each example, made or not."""

    rows: Rows
    n: int
    refused: Rows | None = None
    """Those that will never be there, with the reason (REJECTED schema), where there can be such."""

    def missing(self, example_ids: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which are still to be made: (E, n)."""
        absent = ~self.rows.has_samples(example_ids, self.n)
        if self.refused is not None and absent.any():
            names = pa.array([refused_source(k) for k in range(self.n)], pa.string())
            example, sample = np.nonzero(absent)
            for start in range(0, len(example), LOOKED_UP_TOGETHER):
                part = slice(start, start + LOOKED_UP_TOGETHER)
                ids, sources = example_ids.take(pa.array(example[part])), names.take(pa.array(sample[part]))
                refused = self.refused.contains(pa.table({"example_id": ids, "source": sources}), refresh=start == 0)
                absent[example[part], sample[part]] = ~refused
        return absent


def refused_source(sample_index: int) -> str:
    """How the REJECTED schema names a sample that will never be there."""
    return f"sample:{sample_index}"


def make_missing(
    wanted: Wanted, examples: pa.Table, work: Work, executor: Executor, *, batch_size: int, label: str
) -> int:
    """Make the samples that are missing, from batches of the examples' rows with their `sample_indices`.

    What is made is kept, however this ends.

    Returns:
        How many were missing.
    """
    ids = examples["example_id"]
    if not wanted.missing(ids).any():
        return 0
    with wanted.rows.lock(), wanted.refused.lock() if wanted.refused is not None else nullcontext():
        missing = wanted.missing(ids)  # again: another process may have made them while we waited
        count = int(missing.sum())
        if count:
            executor.run(work, _batches(examples, missing, batch_size), label, count)
    return count


def _batches(examples: pa.Table, missing: NDArray[np.bool_], size: int) -> Iterator[pa.Table]:
    """The examples of which something is missing, `size` at a time; prompts of like length go side by side.

    Only within a window: shards then hold neighbours of the selection, which is what later stages read together.
    """
    for start in range(0, examples.num_rows, WINDOW):
        absent, window = missing[start : start + WINDOW], examples.slice(start, WINDOW)
        lengths = pc.list_value_length(window["prompt_ids"]).to_numpy()
        rows = np.flatnonzero(absent.any(axis=1))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        indices = pa.array([np.flatnonzero(absent[row]) for row in rows], pa.list_(pa.int32()))
        window = window.take(pa.array(rows)).append_column(SAMPLE_INDICES, indices)
        for first in range(0, len(rows), size):
            yield window.slice(first, size)
