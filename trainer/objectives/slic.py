"""SLiC's hinge on log-probs (Zhao et al. 2023), which needs no reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cpo_pipe.trainer.objectives.preference import GroupLosses, PreferenceTraining, mean_over_negatives

if TYPE_CHECKING:
    from torch import Tensor

    from cpo_pipe.trainer.groups import Batch


def slic_loss(policy_GK: Tensor, mask_GK: Tensor, *, margin: float) -> GroupLosses:
    """Return SLiC's hinge loss (Zhao et al. 2023, "SLiC-HF", eq. 1; Xu et al. 2024, "Automatic Pair Construction").

        loss = mean over j of max(0, δ − log π_θ(y_1 | x) + log π_θ(y_j | x))

    Their regularizer, λ times the target's negative log-likelihood, is the MLE loss that `mle_weight` adds.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        mask_GK: which candidates exist.
        margin: δ, in nats.
    """
    reward_GK = policy_GK.masked_fill(~mask_GK, 0)
    loss_GN = (margin - reward_GK[:, :1] + reward_GK[:, 1:]).relu()
    return GroupLosses(mean_over_negatives(loss_GN, mask_GK), reward_GK)


class SLiC(PreferenceTraining):
    """SLiC's hinge on the log-probs of the ground truth and each synthetic negative."""

    citation = "Zhao et al. 2023, *SLiC-HF: Sequence Likelihood Calibration with Human Feedback*"

    margin: float = Field(1.0, gt=0, description="δ, by which the target's log-prob is to exceed a negative's, in nats")

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `slic_loss`."""
        return slic_loss(policy_GK, batch.mask_GK, margin=self.margin)
