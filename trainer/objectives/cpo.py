"""Contrastive Preference Optimization (Feng et al. 2025): the target against all of its negatives together."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cpo_pipe.trainer.objectives.preference import GroupLosses, ReferenceTraining, excluded, relative_rewards

if TYPE_CHECKING:
    from torch import Tensor

    from cpo_pipe.trainer.groups import Batch

PAPER = "Feng et al. 2025, *Sequence-level Large Language Model Training with Contrastive Preference Optimization*"


def cpo_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """Return CPO's loss (Feng et al. 2025, eq. 1): −log softmax of the target's reward in its group.

        loss = −log( exp r_1 / Σ_j exp r_j ),  r_j = β (log π_θ(y_j | x) − log π_ref(y_j | x))

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = relative_rewards(policy_GK, reference_GK, mask_GK, beta)
    log_share_GK = excluded(reward_GK, mask_GK).log_softmax(-1)
    return GroupLosses(-log_share_GK[:, 0], reward_GK)  # eq. 1


def ranked_cpo_loss(
    policy_GK: Tensor, reference_GK: Tensor, rank_GK: Tensor, mask_GK: Tensor, *, beta: float
) -> GroupLosses:
    """Return the loss of CPO with ranking (Feng et al. 2025, eq. 2; Plackett–Luce).

        loss = −Σ_k log( exp r_(k) / Σ_{j ≥ k} exp r_(j) ),  r_(k) the reward of the candidate at rank k

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        rank_GK: position of candidate j in the preference order (the paper's τ(j)); 0 is the best. A permutation of
            0 … K_g − 1 within each group; ignored where the mask is False.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = relative_rewards(policy_GK, reference_GK, mask_GK, beta)
    # The paper's sums run over items in order: the item at rank k, which is argsort of the items' ranks.
    order_GK = rank_GK.masked_fill(~mask_GK, rank_GK.shape[-1]).argsort(dim=-1, stable=True)
    sorted_GK = excluded(reward_GK, mask_GK).gather(-1, order_GK)
    log_rest_GK = sorted_GK.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ_{j ≥ k} exp r_(j)
    terms_GK = (log_rest_GK - sorted_GK).masked_fill(~mask_GK.gather(-1, order_GK), 0)
    return GroupLosses(terms_GK.sum(-1), reward_GK)  # eq. 2


class CPO(ReferenceTraining):
    """CPO, eq. 1: softmax over the ground truth and its synthetic negatives."""

    citation = PAPER

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `cpo_loss`."""
        return cpo_loss(policy_GK, reference_GK, batch.mask_GK, beta=self.beta)


class RankedCPO(ReferenceTraining):
    """CPO, eq. 2: Plackett–Luce over the ground truth and its ranked synthetic negatives."""

    citation = PAPER
    needs_ranks: ClassVar[bool] = True

    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """See `ranked_cpo_loss`."""
        return ranked_cpo_loss(policy_GK, reference_GK, batch.rank_GK, batch.mask_GK, beta=self.beta)
