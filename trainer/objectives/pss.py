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

        # Uniform numbers decide which token is drawn, and whether it is used: (2, L, M) for each target. They depend on
        # step and example alone, so that a resumed training repeats them.
        states, uniform = _states(groups, packed), []
        uniform_SM = torch.zeros(len(packed.source_S), self.sequences, dtype=torch.float64)
        for group, rows in zip(groups, states, strict=True):
            random = np.random.default_rng(int(digest([self.seed, step, group.example_id], 32), 16))
            uniform.append(random.random((2, len(group.candidates[0]), self.sequences)))
            uniform_SM[rows] = torch.from_numpy(uniform[-1][0])
        with torch.no_grad():
            drawn_SM = draw(packed, uniform_SM.to(packed.ids.device)).cpu()
        texts = []
        for group, rows, (_, chance_LM) in zip(groups, states, uniform, strict=True):
            target_L1 = np.array(group.candidates[0])[:, None]
            mixed_LM = np.where(chance_LM < self.replace, drawn_SM[rows].numpy(), target_L1)
            texts.append((group.prompt_ids, mixed_LM.T.tolist()))
        return pack(texts, [group.candidates[:1] * self.sequences for group in groups])


def _states(groups: Sequence[Group], packed: Packed) -> list[Tensor]:
    """Return for each group which hidden state predicts each token of its target: (L,)."""
    row_E, pair_KL = packed.row_E.cpu(), packed.pair_KL.cpu()
    return [row_E[pairs[: len(group.candidates[0])]] for group, pairs in zip(groups, pair_KL, strict=True)]
