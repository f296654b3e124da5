"""Prefix trees of candidates against their definition."""

import random

import pytest
import torch
from torch import Tensor

from cpo_pipe.trainer.scoring.prefix_tree import Packed, pack_rows, pack_trees
from cpo_pipe.trainer.scoring.probes import tree_tokens
from tests.support.scoring import TokenGroup


def prefixes(texts: TokenGroup) -> set[tuple[int, ...]]:
    return {tuple(candidate[:end]) for candidate in texts[1] for end in range(1, len(candidate))}


def ancestors(texts: TokenGroup, packed: Packed) -> Tensor:
    """Which input tokens precede which, by the definition: its prefix is the beginning of the other's."""
    prompt = texts[0]
    paths = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
    paths += sorted(tuple(prompt) + prefix for prefix in prefixes(texts))
    assert sorted(path[-1] for path in paths) == sorted(packed.ids[0].tolist())
    return torch.tensor([[other == path[: len(other)] for other in paths] for path in paths])


@pytest.mark.parametrize("seed", range(20))
def test_each_distinct_prefix_is_there_once_and_sees_what_it_follows(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
    texts = prompt, [[rng.randrange(2) for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(1, 9))]
    packed = pack_trees([texts])
    tree = packed.tree
    assert tree is not None
    assert packed.tokens() == len(prompt) + len(prefixes(texts)) == tree_tokens(texts)
    # Depth-first order with the smallest token first is the order of sorted prefixes.
    assert torch.equal(tree.mask(None), ancestors(texts, packed))
    assert torch.equal(tree.mask(None).sum(-1) - 1, tree.position_N)
    pairs = {(*candidate[: end + 1],) for candidate in texts[1] for end in range(len(candidate))}
    assert len(packed.label_E) == len(pairs), "each distinct (prefix, next token) is scored once"
    assert len(packed.source_S) == len({pair[:-1] for pair in pairs})
    (branches,) = tree.branches
    owned = branches.path_RD.flatten()[branches.own_B]
    assert owned.tolist() == list(range(packed.tokens() - len(prompt)))


def test_a_cut_of_the_target_costs_no_input_token() -> None:
    target = [5, 6, 7, 8, 9, 0]
    alone = pack_trees([([1, 2], [target])])
    cut = pack_trees([([1, 2], [target, [5, 6, 0], [5, 6, 7, 8, 0], [0]])])
    assert torch.equal(alone.ids, cut.ids)
    assert len(cut.source_S) == len(alone.source_S), "nor another row of logits"


def test_padded_rows_share_nothing() -> None:
    packed = pack_rows([([1, 2], [[5, 6, 0], [5, 0]]), ([3], [[4]])])
    assert packed.ids.tolist() == [[1, 2, 5, 6], [1, 2, 5, 0], [3, 0, 0, 0]]
    assert packed.sizes == (2, 1)
