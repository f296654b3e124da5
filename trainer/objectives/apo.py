"""Anchored Preference Optimization (D'Oosterlinck et al. 2024), in its variants zero and down."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cpo_pipe.trainer.objectives.preference import (
    GroupLosses,
    ReferenceTraining,
    mean_over_negatives,
    relative_rewards,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cpo_pipe.trainer.groups import Batch

PAPER = "D'Oosterlinck et al. 2024, *Anchored Preference Optimization and Contrastive Revisions*"


def apo_zero_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """Return the loss of APO-zero, which makes the target more likely and a negative less likely.

        loss = mean over j of 1 − σ(r_1) + σ(r_j); the paper's plus 1, so that it begins at 1

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = relative_rewards(policy_GK, reference_GK, mask_GK, beta)
    loss_GN = 1 - reward_GK[:, :1].sigmoid() + reward_GK[:, 1:].sigmoid()
    return GroupLosses(mean_over_negatives(loss_GN, mask_GK), reward_GK)


def apo_down_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """Return the loss of APO-down, which makes both the target and a negative less likely, the negative more so.

    It is for targets that are worse than the model's own text.

        loss = mean over j of 1 + σ(r_1) − σ(r_1 − r_j); the paper's plus 1, so that it begins at 1

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = relative_rewards(policy_GK, reference_GK, mask_GK, beta)
    loss_GN = 1 + reward_GK[:, :1].sigmoid() - (reward_GK[:, :1] - reward_GK[:, 1:]).sigmoid()
    return GroupLosses(mean_over_negatives(loss_GN, mask_GK), reward_GK)


class APOZero(ReferenceTraining):
    """APO-zero on the ground truth and each synthetic negative."""

    citation = PAPER

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `apo_zero_loss`."""
        return apo_zero_loss(policy_GK, reference_GK, batch.mask_GK, beta=self.beta)


class APODown(ReferenceTraining):
    """APO-down on the ground truth and each synthetic negative."""

    citation = PAPER
    lowers_target: ClassVar[bool] = True

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `apo_down_loss`."""
        return apo_down_loss(policy_GK, reference_GK, batch.mask_GK, beta=self.beta)
