"""Which groups each step takes, and how they are cut into forward passes, over all processes."""

from collections.abc import Iterator, Sequence

import numpy as np

from cpo_pipe.trainer.attention import Attention
from cpo_pipe.trainer.trees import Texts


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's batch: one shuffled pass over all after the other, cut into batches of `size`."""

    def passes() -> Iterator[int]:
        epoch = 0
        while True:
            yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()
            epoch += 1

    stream = passes()
    for _ in range(steps):
        yield [next(stream) for _ in range(size)]


def micro_batches(
    groups: Sequence[Texts], attention: Attention, budget: int, processes: int = 1
) -> list[list[list[int]]]:
    """For each process the indices of the groups of each of its forward passes.

    Every process gets as many forward passes as the others, some of them empty where groups run out: what they exchange
    in each pass (FSDP) must find all of them. Cascade, split and dense attention take one group at a time.

    Args:
        groups: of one step.
        attention: how they will be computed.
        budget: tokens per forward pass, padding included; a single larger group is still computed.
        processes: how many there are.
    """
    # Like lengths go side by side: less padding, and processes that finish together.
    order = sorted(range(len(groups)), key=lambda index: _tokens(groups[index], attention))
    plans = [_cut(order[process::processes], groups, attention, budget) for process in range(processes)]
    passes = max(map(len, plans))
    return [plan + [[] for _ in range(passes - len(plan))] for plan in plans]


def _cut(order: Sequence[int], groups: Sequence[Texts], attention: Attention, budget: int) -> list[list[int]]:
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


def _tokens(group: Texts, attention: Attention) -> int:
    """Input tokens of a group's tree (at most), of all its sequences, or of its longest row."""
    prompt, candidates = group
    inputs = [len(candidate) - 1 for candidate in candidates]
    if attention == "packed":
        return len(inputs) * len(prompt) + sum(inputs)
    return len(prompt) + (max(inputs) if attention in ("padded", "plain") else sum(inputs))
