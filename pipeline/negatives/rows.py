"""Work that makes negatives one example at a time, and the row of a negative that no engine sampled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cpo_pipe.data.executor import Made, Make
from cpo_pipe.pipeline.missing import SAMPLE_INDICES

NegativesOf = Callable[[dict[str, Any], list[int]], Sequence[Mapping[str, Any]]]
"""From an example (EXAMPLES schema) and the sample indices wanted to as many rows (NEGATIVES schema)."""


def per_example(negatives_of: NegativesOf) -> Make:
    """What makes the negatives of a batch from what makes those of an example."""

    def make(batch: pa.Table) -> Iterator[Made]:
        rows = [row for example in batch.to_pylist() for row in negatives_of(example, example[SAMPLE_INDICES])]
        yield Made([rows], len(rows))

    return make


def negative(
    example: Mapping[str, Any],
    sample_index: int,
    seed: int,
    *,
    strategy: str,
    text: str,
    token_ids: Sequence[int],
    ends: bool,
    generator: str | None = None,
    engine: str | None = None,
) -> dict[str, Any]:
    """A row of the NEGATIVES schema; `ends` says whether the text ends there."""
    return {
        "example_id": example["example_id"],
        "sample_index": sample_index,
        "strategy": strategy,
        "text": text,
        "token_ids": token_ids,
        "finish_reason": "stop" if ends else "length",
        "logprob": None,
        "seed": seed,
        "generator": generator,
        "engine": engine,
    }
