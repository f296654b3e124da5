"""Divide texts by length into batches of a token budget."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def batches_by_length(
    lengths: NDArray[np.int64], budget: int, *, rows: NDArray[np.int64] | None = None, padded: bool = True
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of items of similar length, as many at a time as fit into a budget; a longer item is alone.

    Args:
        lengths: tokens of each item, or of its longest row, shape (n,).
        budget: tokens of a batch, padding included.
        rows: rows of each item, shape (n,); None for one each.
        padded: whether all rows of a batch are padded to the longest one. Otherwise `lengths` are added up.
    """
    order = np.argsort(lengths, kind="stable")
    summed = lengths if not padded else np.ones_like(lengths) if rows is None else rows
    total = np.cumsum(summed[order])
    start = before = 0
    for place, row in enumerate(order):
        if place > start and (total[place] - before) * (lengths[row] if padded else 1) > budget:
            yield order[start:place]
            start, before = place, total[place - 1]
    if len(order):
        yield order[start:]
