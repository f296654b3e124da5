"""Groups in forward passes of a token budget, over several processes."""

import pytest

from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.batching import micro_batches

GROUPS = [([1] * 4, [[1] * 5, [1] * 3]), ([1] * 2, [[1] * 3]), ([1] * 3, [[1] * 4, [1] * 2, [1] * 2])]
"""Input tokens as trees 10, 4, 8; as sequences 14, 4, 14; as padded rows 2 × 8, 1 × 4, 3 × 6."""


@pytest.mark.parametrize(
    ("attention", "budget", "passes"),
    [
        ("cascade", 12, [[1, 2], [0]]),
        ("split", 22, [[1, 2, 0]]),
        ("dense", 1000, [[1], [2], [0]]),
        ("flex", 12, [[1, 2], [0]]),
        ("flex", 11, [[1], [2], [0]]),
        ("flex", 22, [[1, 2, 0]]),
        ("packed", 18, [[1, 0], [2]]),
        ("padded", 24, [[1, 2], [0]]),
        ("padded", 23, [[1], [2], [0]]),
        ("plain", 48, [[1, 2, 0]]),
        ("plain", 1, [[1], [2], [0]]),
    ],
)
def test_a_forward_pass_has_the_tokens_of_the_budget(
    attention: AttentionBackend, budget: int, passes: list[list[int]]
) -> None:
    assert micro_batches(GROUPS, attention, budget) == [passes]


def test_all_processes_make_equally_many_passes() -> None:
    assert micro_batches(GROUPS, "cascade", 1, processes=2) == [[[1], [0]], [[2], []]]
    assert micro_batches(GROUPS[:1], "flex", 100, processes=3) == [[[0]], [[]], [[]]]
    assert micro_batches([], "flex", 100, processes=2) == [[], []]
