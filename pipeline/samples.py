"""Find which samples of a run's examples are missing, make them with an engine, and record them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution.base import Executor, Make, NewRows, Work
from cpo_pipe.data.fingerprint import row_seed
from cpo_pipe.data.models.end_tokens import without_end
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Rows, locks
from cpo_pipe.pipeline.engines.base import Engine, Request, Sampling, SamplingDtype
from cpo_pipe.pipeline.engines.registry import choose_engine

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


class LazyEngine:
    """Chooses and loads the engine of a model at its first use; pickled without the engine.

    It holds one engine at a time: one without beam search is dropped when beam search is needed.
    """

    def __init__(self, name: str, model: Model, context: int | None = None, dtype: SamplingDtype = "auto"):
        """Keep what the engine is opened with: its name or `auto`, and the arguments of `Engine`."""
        self.model = model
        self._arguments = name, model, context, dtype
        self._engine: Engine | None = None

    def __call__(self, sampling: Sampling) -> Engine:
        """Return the engine for a sampling."""
        name, model, context, dtype = self._arguments
        beam_search = sampling.beams > 1
        if self._engine is not None and beam_search and not self._engine.beam_search:
            self._engine = None  # first free its memory, which may not suffice for both
        if self._engine is None:
            self._engine = choose_engine(name, model, beam_search)(model, context, dtype)
        return self._engine

    def __reduce__(self) -> tuple[type["LazyEngine"], tuple[str, Model, int | None, SamplingDtype]]:
        return LazyEngine, self._arguments


@dataclass(frozen=True)
class EngineWork(Work):
    """Work that samples continuations of `prompt_ids` with a local engine."""

    rows: Rows
    engine: LazyEngine
    sampling: Sampling
    seed: int
    tokenizer: TokenizerFiles
    """Of prompts and samples."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns with the same value in all rows."""

    def open(self) -> Make:
        """Load the engine and the tokenizer."""
        engine, tokenizer = self.engine(self.sampling), self.tokenizer.load()

        def make(batch: pa.Table) -> Iterator[NewRows]:
            found = list(requests(batch, self.seed))
            for place, samples in engine.generate([request for _, _, request in found], self.sampling):
                example_id, first, request = found[place]
                # Decoding would keep an end token that is not a special token.
                texts = [without_end(sample.token_ids, sample.finish_reason == "stop") for sample in samples]
                rows = [
                    {
                        **self.columns,
                        "example_id": example_id,
                        "sample_index": first + k,
                        "text": tokenizer.decode(texts[k], skip_special_tokens=True),
                        "token_ids": sample.token_ids,
                        "finish_reason": sample.finish_reason,
                        "logprob": _finite(sample.logprob, example_id),
                        "seed": request.seed + k,
                        "engine": engine.description,
                    }
                    for k, sample in enumerate(samples)
                ]
                yield NewRows([rows], len(rows))

        return make


def requests(batch: pa.Table, seed: int) -> Iterator[tuple[str, int, Request]]:
    """Yield example id, first sample index and request for each run of consecutive samples in a batch of examples."""
    columns = (batch[name].to_pylist() for name in ("example_id", "prompt_ids", SAMPLE_INDICES))
    for example_id, prompt_ids, indices in zip(*columns, strict=True):
        start = 0
        for end in range(1, len(indices) + 1):
            if end == len(indices) or indices[end] != indices[end - 1] + 1:
                first = indices[start]
                yield example_id, first, Request(prompt_ids, end - start, row_seed(seed, example_id) + first)
                start = end


def _finite(logprob: float, example_id: str) -> float:
    if not math.isfinite(logprob):
        raise RunError(f"a sample of example {example_id} has the log-prob {logprob}")
    return logprob
