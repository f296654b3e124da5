"""Batches of texts of similar length."""

import numpy as np
import pytest

from cpo_pipe.data.batching import batches_by_length


def batches(lengths: list[int], budget: int, rows: list[int] | None = None, padded: bool = True) -> list[list[int]]:
    counts = None if rows is None else np.array(rows)
    return [batch.tolist() for batch in batches_by_length(np.array(lengths, int), budget, rows=counts, padded=padded)]


def test_a_batch_is_as_large_as_the_budget_allows() -> None:
    assert batches([3, 1, 2, 3], 6) == [[1, 2], [0, 3]], "padded to the longest; equal lengths in their order"
    assert batches([3, 1, 2, 3], 5) == [[1, 2], [0], [3]]
    assert batches([3, 1, 2, 3], 6, padded=False) == [[1, 2, 0], [3]], "nothing is padded"
    assert batches([3, 1, 2, 3], 9, rows=[1, 2, 1, 1]) == [[1, 2, 0][:2], [0, 3]], "three rows of 3 and 2 are one of 9"
    assert batches([2, 2], 100, rows=[25, 26]) == [[0], [1]]
    assert batches([2, 2], 102, rows=[25, 26]) == [[0, 1]]


@pytest.mark.parametrize("padded", [True, False])
def test_an_item_over_the_budget_is_alone(padded: bool) -> None:
    assert batches([9, 1, 8, 1], 4, padded=padded) == [[1, 3], [2], [0]]
    assert batches([], 4, padded=padded) == []
