"""Divide groups into forward passes, over all processes."""

from collections.abc import Sequence

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
    # Sorted by length: less padding, and processes that finish together.
    order = sorted(range(len(groups)), key=lambda index: _tokens(groups[index], attention))
    plans = [_cut(order[process::processes], groups, attention, budget) for process in range(processes)]
    passes = max(map(len, plans))
    return [plan + [[] for _ in range(passes - len(plan))] for plan in plans]


def _cut(
    order: Sequence[int], groups: Sequence[TokenGroup], attention: AttentionBackend, budget: int
) -> list[list[int]]:
    if attention in ("cascade", "split", "dense"):
        return [[index] for index in order]
    plan: list[list[int]] = []
    rows = longest = total = 0
    for index in order:
        tokens, count = _tokens(groups[index], attention), len(groups[index][1])
        rows, longest, total = rows + count, max(longest, tokens), total + tokens
        if plan and (total if attention in ("flex", "packed") else rows * longest) <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
            rows, longest, total = count, tokens, tokens
    return plan


def _tokens(group: TokenGroup, attention: AttentionBackend) -> int:
    """Return the input tokens of a group's tree (at most), of all its sequences, or of its longest row."""
    prompt, candidates = group
    inputs = [len(candidate) - 1 for candidate in candidates]
    if attention == "packed":
        return len(inputs) * len(prompt) + sum(inputs)
    return len(prompt) + (max(inputs) if attention in ("padded", "plain") else sum(inputs))
