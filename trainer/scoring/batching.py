"""Divide groups into forward passes, over all processes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.trainer.scoring.group_table import TokenGroup

if TYPE_CHECKING:  # it imports torch
    from cpo_pipe.trainer.scoring.attention import AttentionBackend

PassTokens = int | Literal["auto"]
"""Tokens per forward pass; `auto` depends on the device."""

AUTO_TOKENS = {"cpu": 2048, "cuda": 8192}
"""What `auto` means: with more a CPU is hardly faster (docs/log.md), but needs more memory."""


def pass_tokens(asked: PassTokens, device: str) -> int:
    """Return the tokens per forward pass on a type of device."""
    return AUTO_TOKENS[device] if asked == "auto" else asked


def micro_batches(
    groups: Sequence[TokenGroup], attention: "AttentionBackend", budget: int, processes: int = 1
) -> list[list[list[int]]]:
    """Return, for each process, the indices of the groups of each of its forward passes.

    All processes get the same number of forward passes, because they communicate in each of them (FSDP); the last ones
    are empty where groups run out. `dense` computes one group at a time.

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
    if attention == "dense":
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


def _tokens(group: TokenGroup, attention: "AttentionBackend") -> int:
    """Return the input tokens of a group's tree (at most), of all its sequences, or of its longest row."""
    prompt, candidates = group
    inputs = [len(candidate) - 1 for candidate in candidates]
    if attention == "packed":
        return len(inputs) * len(prompt) + sum(inputs)
    return len(prompt) + (max(inputs) if attention in ("padded", "plain") else sum(inputs))
