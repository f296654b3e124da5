"""Divide groups into forward passes, over all processes."""

from collections.abc import Sequence

import numpy as np

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.group_table import TokenGroup


def micro_batches(
    groups: Sequence[TokenGroup], attention: AttentionBackend, budget: int, processes: int = 1
) -> list[list[list[int]]]:
    """Return, for each process, the indices of the groups of each of its forward passes.

    All processes get the same number of forward passes, because they communicate in each of them (FSDP); the last ones
    are empty where groups run out. `cascade`, `split` and `dense` compute one group at a time.

    Args:
        groups: the groups of one step.
        attention: the backend that will compute them.
        budget: tokens per forward pass, padding included; a single larger group is still computed.
        processes: number of processes.
    """
    tokens_G = np.array([_tokens(group, attention) for group in groups], np.int64)
    rows_G = np.array([len(candidates) for _, candidates in groups], np.int64)
    # Sorted by length: less padding, and processes that finish together.
    order = np.argsort(tokens_G, kind="stable")
    shares = [order[process::processes] for process in range(processes)]
    if attention in ("cascade", "split", "dense"):
        plans = [[[index] for index in mine.tolist()] for mine in shares]
    else:
        padded = attention in ("padded", "plain")
        plans = [
            [
                mine[batch].tolist()
                for batch in batches_by_length(tokens_G[mine], budget, rows=rows_G[mine], padded=padded)
            ]
            for mine in shares
        ]
    passes = max(map(len, plans))
    return [plan + [[] for _ in range(passes - len(plan))] for plan in plans]


def _tokens(group: TokenGroup, attention: AttentionBackend) -> int:
    """Return the input tokens of a group's tree (at most), of all its sequences, or of its longest row."""
    prompt, candidates = group
    inputs = [len(candidate) - 1 for candidate in candidates]
    if attention == "packed":
        return len(inputs) * len(prompt) + sum(inputs)
    return len(prompt) + (max(inputs) if attention in ("padded", "plain") else sum(inputs))
