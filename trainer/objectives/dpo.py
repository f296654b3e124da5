"""Direct Preference Optimization (Rafailov et al. 2023): the target against each of its negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cpo_pipe.trainer.objectives.preference import (
    GroupLosses,
    ReferenceTraining,
    mean_over_negatives,
    relative_rewards,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cpo_pipe.trainer.groups import Batch


def dpo_loss(
    policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> GroupLosses:
    """Return DPO's loss (Rafailov et al. 2023, eq. 7; Feng et al. 2025, eq. 5).

        loss = mean over j of −(1 − ε) log σ(r_1 − r_j) − ε log σ(r_j − r_1)

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
        label_smoothing: ε, the probability that chosen and rejected are swapped (Mitchell 2023, "conservative DPO").
    """
    from torch.nn.functional import logsigmoid

    reward_GK = relative_rewards(policy_GK, reference_GK, mask_GK, beta)
    margin_GN = reward_GK[:, :1] - reward_GK[:, 1:]
    loss_GN = -(1 - label_smoothing) * logsigmoid(margin_GN) - label_smoothing * logsigmoid(-margin_GN)
    return GroupLosses(mean_over_negatives(loss_GN, mask_GK), reward_GK)


class DPO(ReferenceTraining):
    """DPO on the ground truth and each synthetic negative."""

    citation = "Rafailov et al. 2023, *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*"

    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="ε, the probability that chosen and rejected are swapped"
    )

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `dpo_loss`."""
        return dpo_loss(policy_GK, reference_GK, batch.mask_GK, beta=self.beta, label_smoothing=self.label_smoothing)
