"""Maximum likelihood of the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from cpo_pipe.trainer.objectives.base import GroupFigures, Training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cpo_pipe.trainer.groups import Group

NEEDS_NEGATIVES = ("strength", "similarity", "margin")
"""Curricula that compare the target with its negatives."""


def mle_loss(target_logprob_G: Tensor) -> Tensor:
    """Return −log π_θ(y_1 | x) of each target, summed over its tokens, in nats: (G,)."""
    return -target_logprob_G


class MLE(Training):
    """Maximum likelihood of the targets."""

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.attention in ("cascade", "split", "dense"):
            raise ValueError(
                f"attention is {self.attention}, which shares a prompt among candidates, but {self.objective} trains "
                "on targets alone; use auto, flex, packed or padded"
            )
        by = self.curriculum.by if self.curriculum is not None else None
        if by in NEEDS_NEGATIVES:
            raise ValueError(
                f"curriculum.by is {by}, which needs negatives; for the objective {self.objective} use likelihood or "
                "length"
            )
        if by == "likelihood" and not isinstance(self.init, str):
            raise ValueError("curriculum.by is likelihood, but init is a model with random weights; use length")
        return self

    def figures(self, groups: Sequence[Group], logprobs: Sequence[Tensor]) -> GroupFigures:
        """Return the negative log-likelihood of each target, the mean over the sequences scored for it."""
        import torch

        zero_G = torch.zeros(len(logprobs), device=logprobs[0].device)
        nll_G = mle_loss(torch.stack([values.mean() for values in logprobs]))
        return GroupFigures(nll_G, zero_G, zero_G, zero_G, zero_G, zero_G)
