"""Parallel scheduled sampling (Duckworth et al. 2019; the baseline PSS of Feng et al. 2025).

The policy draws a token at each position of the target, given the true ones before it, all positions at once and
without gradient. Inputs then mix true and drawn tokens, and labels stay true: the model learns to go on from its own
words. Several such sequences are drawn of each target at every step, by the policy as it is then.

Shapes: L tokens of a target, M sequences drawn of it, S hidden states that predict something.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpo_pipe.data.fingerprint import digest
from cpo_pipe.trainer.groups import Group
from cpo_pipe.trainer.trees import Packed


class Draws:
    """The chances of one step, which depend on its number and the example alone: a resumed training draws the same."""

    def __init__(self, seed: int, step: int, sequences: int, replace: float):
        """`replace` is the chance that a token is a drawn one."""
        self._identity = [seed, step]
        self._sequences, self._replace = sequences, replace

    def _uniform(self, group: Group) -> NDArray[np.float64]:
        """For each token of the target and each sequence: which token is drawn, and whether it is taken: (2, L, M)."""
        random = np.random.default_rng(int(digest([*self._identity, group.example_id], 32), 16))
        return random.random((2, len(group.candidates[0]), self._sequences))

    def uniform(self, groups: Sequence[Group], packed: Packed) -> Tensor:
        """What decides the token drawn after each hidden state of `packed`, the groups' targets: (S, M)."""
        uniform_SM = torch.zeros(len(packed.source_S), self._sequences, dtype=torch.float64)
        for group, states in zip(groups, _states(groups, packed), strict=True):
            uniform_SM[states] = torch.from_numpy(self._uniform(group)[0])
        return uniform_SM.to(packed.ids.device)

    def mixed(self, groups: Sequence[Group], packed: Packed, drawn_SM: Tensor) -> list[list[list[int]]]:
        """Of each group M sequences of true and drawn tokens."""
        found = []
        for group, states in zip(groups, _states(groups, packed), strict=True):
            drawn_LM = drawn_SM.cpu()[states].numpy()
            gold_LM = np.broadcast_to(np.array(group.candidates[0])[:, None], drawn_LM.shape)
            taken_LM = self._uniform(group)[1] < self._replace
            found.append(np.where(taken_LM, drawn_LM, gold_LM).T.tolist())
        return found


def _states(groups: Sequence[Group], packed: Packed) -> list[Tensor]:
    """Of each group which hidden state predicts each token of its target: (L,)."""
    row_E, pair_KL = packed.row_E.cpu(), packed.pair_KL.cpu()
    return [row_E[pairs[: len(group.candidates[0])]] for group, pairs in zip(groups, pair_KL, strict=True)]
