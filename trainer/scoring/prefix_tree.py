"""Groups as prefix trees of tokens: the prompt is the trunk, and a prefix that candidates share is computed once.

A candidate's last token is never an input, only a label. So a candidate that cuts another one short and ends with an
EOS adds no input token. Shared prefixes are found by token ids, never by how a candidate was made.

Shapes: N input tokens of all groups of a row; of one group, P tokens of the prompt, B behind it, R paths from the
prompt's end to a leaf, D tokens of the longest of these; E distinct (prefix, next token) pairs, S distinct prefixes
among them, K candidates, L tokens of the longest.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cpo_pipe.data.models.chat import common_length
from cpo_pipe.trainer.scoring.group_table import TokenGroup


@dataclass(frozen=True)
class Branches:
    """What follows the prompt of one group: B tokens."""

    prompt: int
    """Tokens of the prompt (P)."""
    path_RD: Tensor
    """Each path from the prompt's end to a leaf, as indices into the B tokens; 0 after its end."""
    own_B: Tensor
    """Place in the flattened paths where each of the B tokens occurs first, in their order."""

    def depth(self) -> int:
        """Return the tokens of the longest path, prompt included."""
        return self.prompt + self.path_RD.shape[1]


@dataclass(frozen=True)
class Tree:
    """Structure of the groups of a row, as tree attention needs it.

    The groups follow each other. The input tokens of each are in depth-first order: a subtree is a range.
    """

    lengths: tuple[int, ...]
    """Input tokens of each group."""
    branches: tuple[Branches, ...]
    """Of each group."""
    end_N: Tensor
    """One past the last token of each token's subtree: i attends to j where j ≤ i < end[j]."""
    position_N: Tensor
    """Distance from the prompt's beginning."""
    _blocks: dict[int | None, Any] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Return which tokens each token attends to, at a distance of less than `window` positions: (N, N)."""
        index_N = torch.arange(len(self.end_N), device=self.end_N.device)
        return self._sees(window)(None, None, index_N.unsqueeze(1), index_N)

    def block_mask(self, window: int | None) -> Any:
        """Return the same as a mask for FlexAttention, made once for all layers."""
        if window not in self._blocks:
            from torch.nn.attention.flex_attention import create_block_mask

            count, device = len(self.end_N), self.end_N.device
            compiled = device.type == "cuda"
            made = create_block_mask(
                self._sees(window), None, None, count, count, device=device.type, _compile=compiled
            )
            self._blocks[window] = made
        return self._blocks[window]

    def _sees(self, window: int | None) -> Callable[..., Tensor]:
        end_N, position_N = self.end_N, self.position_N

        def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            allowed = (key <= query) & (query < end_N[key])
            return allowed if window is None else allowed & (position_N[query] - position_N[key] < window)

        return sees


@dataclass(frozen=True)
class Packed:
    """Input of one forward pass: one or more groups, and the log-probs to compute."""

    ids: Tensor
    """(rows, tokens); with a tree, one row."""
    source_S: Tensor
    """Indices of the hidden states, of rows times tokens, that predict a token."""
    row_E: Tensor
    """Which of the S predicts the token of each pair; non-decreasing."""
    first_S: list[int]
    """The first pair of each of the S, and E at the end; a list, so that reading it needs no device synchronization."""
    label_E: Tensor
    """The predicted token of each pair."""
    pair_KL: Tensor
    """Pairs of each candidate, token by token; E after its end. Candidates of several groups follow each other."""
    sizes: tuple[int, ...]
    """Number of candidates of each group."""
    tree: Tree | None = None
    """None for groups that are not packed as trees."""

    def per_token(self, logprob_E: Tensor) -> Tensor:
        """Return the log-probs of each candidate's tokens, 0 after its end: (K, L)."""
        return torch.cat([logprob_E, logprob_E.new_zeros(1)])[self.pair_KL]

    def per_group(self, logprob_E: Tensor) -> tuple[Tensor, ...]:
        """Return the summed log-probs of the candidates, group by group."""
        return torch.split(self.per_token(logprob_E).sum(-1), list(self.sizes))

    def to(self, device: torch.device) -> "Packed":
        """Return the same on a device."""
        tree = self.tree
        if tree is not None:
            branches = tuple(replace(one, **_tensors(one, device)) for one in tree.branches)
            tree = replace(tree, branches=branches, _blocks={}, **_tensors(tree, device))
        return replace(self, tree=tree, **_tensors(self, device))

    def tokens(self) -> int:
        """Return the number of tokens that the forward pass computes, padding included."""
        return self.ids.numel()


def _tensors(value: Any, device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in vars(value).items() if isinstance(tensor, Tensor)}


Labels = Sequence[Sequence[Sequence[int]]]
"""Tokens to predict for each candidate of each group, where they are not the candidate's own."""


def _labelled(groups: Sequence[TokenGroup], labels: Labels | None) -> Iterator[tuple[Sequence[int], Any, Any]]:
    """Yield each group's prompt, candidates, and the tokens that they predict."""
    for number, (prompt, candidates) in enumerate(groups):
        yield prompt, candidates, candidates if labels is None else labels[number]


class _Pairs:
    """Collects distinct (hidden state, next token) pairs."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], int] = {}
        self._candidates: list[list[int]] = []

    def add(self, sources: Sequence[int], tokens: Sequence[int]) -> None:
        """Add a candidate: the hidden states, and the token that each predicts."""
        found = self._pairs
        self._candidates.append([found.setdefault(pair, len(found)) for pair in zip(sources, tokens, strict=True)])

    def tensors(self) -> dict[str, Any]:
        """Return fields of Packed, with pairs in the order of their hidden states."""
        pairs = sorted(self._pairs)
        place = {self._pairs[pair]: number for number, pair in enumerate(pairs)}
        sources = sorted({source for source, _ in pairs})
        row = {source: number for number, source in enumerate(sources)}
        rows = [row[source] for source, _ in pairs]
        width = max(map(len, self._candidates))
        return {
            "source_S": torch.tensor(sources),
            "row_E": torch.tensor(rows),
            "first_S": [bisect_left(rows, number) for number in range(len(sources) + 1)],
            "label_E": torch.tensor([token for _, token in pairs]),
            "pair_KL": torch.tensor(
                [[place[n] for n in numbers] + [len(pairs)] * (width - len(numbers)) for numbers in self._candidates]
            ),
        }


def pack_trees(groups: Sequence[TokenGroup], labels: Labels | None = None) -> Packed:
    """Return groups one after the other in one row, each a tree."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    lengths: list[int] = []
    branches: list[Branches] = []
    pairs = _Pairs()
    for prompt, candidates, predicted in _labelled(groups, labels):
        paths: list[list[int]] = []
        own: list[tuple[int, int]] = []
        first, trunk = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        ends += [0] * len(prompt)
        nodes_of: dict[int, list[int]] = {}
        nodes: list[int] = []  # of the previous path
        before: Sequence[int] = ()
        shared_with_leaf = 0
        # In lexicographic order, a path shares with the whole tree what it shares with the previous path.
        for index in sorted(range(len(candidates)), key=lambda j: list(candidates[j][:-1])):
            path = candidates[index][:-1]
            shared = common_length(before, path)
            if shared < len(before):
                _close(nodes[shared:], ends, len(ids))
                paths.append([node - trunk for node in nodes])
                own += [(len(paths) - 1, depth) for depth in range(shared_with_leaf, len(nodes))]
                shared_with_leaf = shared
            nodes = [*nodes[:shared], *range(len(ids), len(ids) + len(path) - shared)]
            ids += path[shared:]
            positions += range(len(prompt) + shared, len(prompt) + len(path))
            ends += [0] * (len(path) - shared)
            nodes_of[index] = nodes
            before = path
        if nodes:
            _close(nodes, ends, len(ids))
            paths.append([node - trunk for node in nodes])
            own += [(len(paths) - 1, depth) for depth in range(shared_with_leaf, len(nodes))]
        _close(range(first, trunk), ends, len(ids))
        for index, candidate in enumerate(candidates):
            assert len(predicted[index]) == len(candidate)
            pairs.add([trunk - 1, *nodes_of[index]], predicted[index])
        lengths.append(len(ids) - first)
        branches.append(_branches(len(prompt), paths, own))
    return Packed(
        ids=torch.tensor([ids]),
        sizes=tuple(len(candidates) for _, candidates in groups),
        tree=Tree(tuple(lengths), tuple(branches), torch.tensor(ends), torch.tensor(positions)),
        **pairs.tensors(),
    )


def _branches(prompt: int, paths: Sequence[list[int]], own: Sequence[tuple[int, int]]) -> Branches:
    depth = max(map(len, paths), default=0)
    path_RD = [path + [0] * (depth - len(path)) for path in paths]
    return Branches(
        prompt,
        torch.tensor(path_RD, dtype=torch.long).view(len(paths), depth),
        torch.tensor([row * depth + column for row, column in own], dtype=torch.long),
    )


def pack_sequences(groups: Sequence[TokenGroup], labels: Labels | None = None) -> Packed:
    """Return each prompt with each candidate as a sequence of its own, one after the other in one row.

    Nothing is shared, and nothing is padded.
    """
    alone = [(prompt, [candidate]) for prompt, candidates in groups for candidate in candidates]
    predicted = None if labels is None else [[ids] for of in labels for ids in of]
    return replace(pack_trees(alone, predicted), sizes=tuple(len(candidates) for _, candidates in groups))


def _close(nodes: Sequence[int], ends: list[int], end: int) -> None:
    for node in nodes:
        ends[node] = end


def pack_rows(groups: Sequence[TokenGroup], labels: Labels | None = None) -> Packed:
    """Return each prompt with each candidate in a row of its own, padded on the right.

    Nothing is shared. A causal model needs no attention mask for padding on the right.
    """
    rows = [[*prompt, *candidate[:-1]] for prompt, candidates in groups for candidate in candidates]
    width = max(map(len, rows))
    pairs = _Pairs()
    row = 0
    for prompt, _, predicted in _labelled(groups, labels):
        for tokens in predicted:
            start = row * width + len(prompt) - 1
            pairs.add(range(start, start + len(tokens)), tokens)
            row += 1
    return Packed(
        ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in rows]),
        sizes=tuple(len(candidates) for _, candidates in groups),
        **pairs.tensors(),
    )
