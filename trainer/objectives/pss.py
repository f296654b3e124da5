"""Parallel scheduled sampling (Duckworth et al. 2019; the baseline PSS of Feng et al. 2025).

The policy draws a token at each position of the target, given the true tokens before it, all positions in parallel and
without gradient. Inputs then mix true and drawn tokens, and labels stay true: the model learns to continue its own
text. At every step several such sequences are drawn for each target, by the current policy.

Shapes: L tokens of a target, M sequences drawn for it, S hidden states that predict something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cpo_pipe.data.config import Positive
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.trainer.objectives.mle import MLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cpo_pipe.trainer.groups import Group
    from cpo_pipe.trainer.scoring.group_table import TokenGroup
    from cpo_pipe.trainer.scoring.prefix_tree import Packed


class PSS(MLE):
    """Parallel scheduled sampling: maximum likelihood of the targets after inputs with sampled tokens."""

    citation = "Duckworth et al. 2019, *Parallel Scheduled Sampling*"

    sequences: Positive = Field(3, description="sequences with sampled tokens per target and step")
    replace: float = Field(
        0.5, ge=0, le=1, description="probability that a token of such a sequence is sampled from the policy"
    )

    def largest_texts(self, group: Group) -> TokenGroup:
        """Return the target as often as sequences are drawn for it."""
        prompt, target = self.texts(group)
        return prompt, list(target) * self.sequences

    def inputs(
        self, groups: Sequence[Group], step: int | None, pack: Callable[..., Packed], draw: Callable[..., Tensor]
    ) -> Packed:
        """Return mixed inputs that predict the targets' own tokens; where the loss is only measured, the targets."""
        packed = super().inputs(groups, step, pack, draw)
        if step is None:
            return packed
        import torch

        draws = Draws(self.seed, step, self.sequences, self.replace)
        with torch.no_grad():
            drawn_SM = draw(packed, draws.uniform(groups, packed))
        mixed = draws.mixed(groups, packed, drawn_SM)
        texts = [(group.prompt_ids, inputs) for group, inputs in zip(groups, mixed, strict=True)]
        return pack(texts, [group.candidates[:1] * self.sequences for group in groups])


class Draws:
    """The random numbers of one step, which a resumed training repeats: they depend on step and example alone.

    Args:
        seed: of the training.
        step: the optimizer step.
        sequences: M.
        replace: the probability that a token is a drawn one.
    """

    def __init__(self, seed: int, step: int, sequences: int, replace: float):
        self._identity = [seed, step]
        self._sequences, self._replace = sequences, replace

    def _uniform(self, group: Group) -> NDArray[np.float64]:
        """Return what decides which token is drawn, and whether it is used: (2, L, M)."""
        random = np.random.default_rng(int(digest([*self._identity, group.example_id], 32), 16))
        return random.random((2, len(group.candidates[0]), self._sequences))

    def uniform(self, groups: Sequence[Group], packed: Packed) -> Tensor:
        """Return what decides the token drawn after each hidden state of `packed`, the groups' targets: (S, M)."""
        import torch

        uniform_SM = torch.zeros(len(packed.source_S), self._sequences, dtype=torch.float64)
        for group, states in zip(groups, _states(groups, packed), strict=True):
            uniform_SM[states] = torch.from_numpy(self._uniform(group)[0])
        return uniform_SM.to(packed.ids.device)

    def mixed(self, groups: Sequence[Group], packed: Packed, drawn_SM: Tensor) -> list[list[list[int]]]:
        """Return for each group M sequences of true and drawn tokens."""
        found = []
        for group, states in zip(groups, _states(groups, packed), strict=True):
            drawn_LM = drawn_SM.cpu()[states].numpy()
            gold_LM = np.broadcast_to(np.array(group.candidates[0])[:, None], drawn_LM.shape)
            taken_LM = self._uniform(group)[1] < self._replace
            found.append(np.where(taken_LM, drawn_LM, gold_LM).T.tolist())
        return found


def _states(groups: Sequence[Group], packed: Packed) -> list[Tensor]:
    """Return for each group which hidden state predicts each token of its target: (L,)."""
    row_E, pair_KL = packed.row_E.cpu(), packed.pair_KL.cpu()
    return [row_E[pairs[: len(group.candidates[0])]] for group, pairs in zip(groups, pair_KL, strict=True)]
