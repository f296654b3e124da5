"""Find which samples of a run's examples are missing, make them and record them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.execution.base import Executor, Work
from cpo_pipe.data.store import Rows, locks

WINDOW = 1024
"""Examples that are sorted together by the length of their prompts."""

LOOKUP_SIZE = 1 << 20
"""Samples looked up at a time among the refused ones; bounds the memory for their keys."""

SAMPLE_INDICES = "sample_indices"
"""The column of a batch with the indices of each example's missing samples."""


@dataclass(frozen=True)
class SampleRequest:
    """Samples 0 … n − 1 of each example."""

    rows: Rows
    n: int
    refused: Rows | None = None
    """Samples that cannot be made, with the reasons (REJECTED schema); None where all can be made."""

    def missing(self, example_ids: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Return which samples are neither made nor refused: (E, n)."""
        absent = ~self.rows.has_samples(example_ids, self.n)
        if self.refused is not None and absent.any():
            names = pa.array([refused_source(k) for k in range(self.n)], pa.string())
            example, sample = np.nonzero(absent)
            for start in range(0, len(example), LOOKUP_SIZE):
                part = slice(start, start + LOOKUP_SIZE)
                ids, sources = example_ids.take(pa.array(example[part])), names.take(pa.array(sample[part]))
                refused = self.refused.contains(pa.table({"example_id": ids, "source": sources}), refresh=start == 0)
                absent[example[part], sample[part]] = ~refused
        return absent


def refused_source(sample_index: int) -> str:
    """Return the `source` of a refused sample in the REJECTED schema."""
    return f"sample:{sample_index}"


def make_missing(
    request: SampleRequest, examples: pa.Table, work: Work, executor: Executor, *, batch_size: int, label: str
) -> int:
    """Make the missing samples, in batches of the examples' rows with a column `sample_indices`.

    Completed samples are kept if this fails or is interrupted.

    Returns:
        The number of samples that were missing.
    """

    def make(missing: NDArray[np.bool_]) -> None:
        executor.run(work, _batches(examples, missing, batch_size), label, int(missing.sum()))

    outputs = [request.rows] if request.refused is None else [request.rows, request.refused]
    made = locks.make_missing(lambda: request.missing(examples["example_id"]), make, *outputs)
    return 0 if made is None else int(made.sum())


def _batches(examples: pa.Table, missing: NDArray[np.bool_], size: int) -> Iterator[pa.Table]:
    """Yield the examples with missing samples, `size` at a time, sorted by prompt length within a window.

    The window is small, so that a shard holds neighbours of the selection, which later stages read together.
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
