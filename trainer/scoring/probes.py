"""The few groups that the self-check computes, chosen from all groups of a training or of a scoring job."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from cpo_pipe.data.models.chat import common_length
from cpo_pipe.trainer.scoring.group_table import Flags, Lengths, TokenGroup, restricted

TREES = 64
"""Groups with the most tokens that are searched for the largest tree."""


@dataclass(frozen=True)
class Probes:
    """The groups and sizes that decide which attention backend computes a set of groups. Small, and can be pickled."""

    groups: Sequence[TokenGroup]
    """The longest, the middle and the shortest group, by their longest row; and the one with the largest tree."""
    rows: tuple[int, int]
    """Input tokens of the shortest and of the longest row."""
    candidates: int
    """Candidates of the group that has most."""
    tokens: int
    """Tokens of the largest group, prompt and candidates."""


def select_probes(groups: pa.Table, wanted_C: Flags | None = None) -> Probes:
    """Return the probes of a table of groups.

    Args:
        groups: see group_table.py; at least one group.
        wanted_C: which candidates will be computed, at least one; None for all.
    """
    lengths = Lengths.of(groups)
    wanted_C = np.ones(len(lengths.candidate_C), np.bool_) if wanted_C is None else wanted_C
    bounds = lengths.bounds()
    count_G = np.add.reduceat(wanted_C, bounds[:-1], dtype=np.int64)
    longest_G = lengths.prompt_G + np.maximum.reduceat(lengths.candidate_C * wanted_C, bounds[:-1])
    row_C = (np.repeat(lengths.prompt_G, lengths.size_G) + lengths.candidate_C)[wanted_C]
    present = np.flatnonzero(count_G)
    by_length = present[np.argsort(longest_G[present], kind="stable")]
    tokens_G = lengths.prompt_G + np.add.reduceat(lengths.candidate_C * wanted_C, bounds[:-1])
    places = sorted({len(present) - 1, (len(present) - 1) // 2, 0}, reverse=True)

    def token_group(row: int) -> TokenGroup:
        (found,) = restricted(groups.slice(row, 1), wanted_C[bounds[row] : bounds[row + 1]]).to_pylist()
        return found["prompt_ids"], [candidate["token_ids"] for candidate in found["candidates"]]

    largest, most = -1, 0
    for row in present[np.argsort(-tokens_G[present], kind="stable")][:TREES].tolist():
        if tokens_G[row] <= most:  # candidates share tokens: a tree has at most so many
            break
        tokens = tree_tokens(token_group(row))
        largest, most = (row, tokens) if tokens > most else (largest, most)
    chosen = [token_group(row) for row in dict.fromkeys([*by_length[places].tolist(), largest])]
    rows = int(row_C.min()) - 1, int(row_C.max()) - 1
    return Probes(tuple(chosen), rows, int(count_G.max()), int(tokens_G[present].max()))


def tree_tokens(group: TokenGroup) -> int:
    """Return the input tokens of a group's prefix tree (prefix_tree.py), without building it."""
    prompt, candidates = group
    paths = sorted(list(candidate[:-1]) for candidate in candidates)
    shared = sum(common_length(*neighbours) for neighbours in pairwise(paths))
    return len(prompt) + sum(map(len, paths)) - shared
