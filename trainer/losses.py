"""The objectives as pure functions: log-probs in, a loss per group out, unreduced.

Shapes: G groups, K candidates of the largest group. Candidate 0 is the target. `mask` is True where a candidate exists;
groups of K = 1 have loss 0 (callers leave them out of the mean). Objectives on pairs take the target with each of its
negatives, and the mean over these pairs: with K = 2 they are what their papers say.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class GroupLosses(NamedTuple):
    """What an objective returns."""

    loss_G: Tensor
    """Loss per group, in nats."""
    reward_GK: Tensor
    """β (log π_θ − log π_ref), of SLiC log π_θ; 0 where the mask is False."""


def cpo_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """CPO, Feng et al. 2025, eq. 1: −log softmax of the target's reward among its group's.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = _rewards(policy_GK, reference_GK, mask_GK, beta)
    log_share_GK = _exclude(reward_GK, mask_GK).log_softmax(-1)
    return GroupLosses(-log_share_GK[:, 0], reward_GK)  # eq. 1


def ranked_cpo_loss(
    policy_GK: Tensor, reference_GK: Tensor, rank_GK: Tensor, mask_GK: Tensor, *, beta: float
) -> GroupLosses:
    """CPO with ranking (Plackett–Luce), Feng et al. 2025, eq. 2.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        rank_GK: position of candidate j in the preference order (the paper's τ(j)); 0 is the best. A permutation of
            0 … K_g − 1 within each group; ignored where the mask is False.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = _rewards(policy_GK, reference_GK, mask_GK, beta)
    # The paper's sums run over items in order: the item at rank k, which is argsort of the items' ranks.
    order_GK = rank_GK.masked_fill(~mask_GK, rank_GK.shape[-1]).argsort(dim=-1, stable=True)
    sorted_GK = _exclude(reward_GK, mask_GK).gather(-1, order_GK)
    log_rest_GK = sorted_GK.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ_{j ≥ k} exp r_(j)
    terms_GK = (log_rest_GK - sorted_GK).masked_fill(~mask_GK.gather(-1, order_GK), 0)
    return GroupLosses(terms_GK.sum(-1), reward_GK)  # eq. 2


def dpo_loss(
    policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> GroupLosses:
    """DPO, Rafailov et al. 2023, eq. 7; Feng et al. 2025, eq. 5.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
        label_smoothing: ε, the chance that a pair is the wrong way round (Mitchell 2023, "conservative DPO").
    """
    reward_GK = _rewards(policy_GK, reference_GK, mask_GK, beta)
    margin_GN = reward_GK[:, :1] - reward_GK[:, 1:]
    loss_GN = -(1 - label_smoothing) * logsigmoid(margin_GN) - label_smoothing * logsigmoid(-margin_GN)
    return GroupLosses(_over_negatives(loss_GN, mask_GK), reward_GK)


def slic_loss(policy_GK: Tensor, mask_GK: Tensor, *, margin: float) -> GroupLosses:
    """SLiC's hinge on log-probs, which needs no reference: max(0, δ − log π_θ(y_1 | x) + log π_θ(y_j | x)).

    Zhao et al. 2023, "SLiC-HF", eq. 1, and Xu et al. 2024, "Automatic Pair Construction"; their regularizer, λ times
    the target's negative log-likelihood, is the MLE loss beside it.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        mask_GK: which candidates exist.
        margin: δ, in nats.
    """
    reward_GK = policy_GK.masked_fill(~mask_GK, 0)
    loss_GN = (margin - reward_GK[:, :1] + reward_GK[:, 1:]).relu()
    return GroupLosses(_over_negatives(loss_GN, mask_GK), reward_GK)


def apo_zero_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """APO-zero: the target becomes likelier than under the reference, a negative less likely.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization": −σ(r_1) + σ(r_j), plus 1, so that it begins at 1.

    Args:
        policy_GK: log π_θ(y_j | x), summed over tokens.
        reference_GK: log π_ref(y_j | x), likewise.
        mask_GK: which candidates exist.
        beta: β of the reward.
    """
    reward_GK = _rewards(policy_GK, reference_GK, mask_GK, beta)
    loss_GN = 1 - reward_GK[:, :1].sigmoid() + reward_GK[:, 1:].sigmoid()
    return GroupLosses(_over_negatives(loss_GN, mask_GK), reward_GK)


def apo_down_loss(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, *, beta: float) -> GroupLosses:
    """APO-down, for targets worse than what the model writes: both become less likely, a negative the more so.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization": σ(r_1) − σ(r_1 − r_j), plus 1; arguments as above.
    """
    reward_GK = _rewards(policy_GK, reference_GK, mask_GK, beta)
    loss_GN = 1 + reward_GK[:, :1].sigmoid() - (reward_GK[:, :1] - reward_GK[:, 1:]).sigmoid()
    return GroupLosses(_over_negatives(loss_GN, mask_GK), reward_GK)


def mle_loss(target_logprob_G: Tensor) -> Tensor:
    """Negative log-likelihood of each target, summed over its tokens; callers divide by the batch's target tokens."""
    return -target_logprob_G


def won(reward_GK: Tensor, mask_GK: Tensor, noise_G: Tensor | float = 0.0) -> Tensor:
    """Per group, whether the target's reward is strictly the greatest, by more than `noise_G`."""
    return reward_GK[:, 0] > _exclude(reward_GK, mask_GK)[:, 1:].amax(-1) + noise_G


def margin(reward_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Per group, the target's reward less the mean reward of its negatives; for groups of K ≥ 2."""
    negatives = mask_GK[:, 1:].sum(-1)
    return reward_GK[:, 0] - (reward_GK[:, 1:] * mask_GK[:, 1:]).sum(-1) / negatives


def _rewards(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, beta: float) -> Tensor:
    return (beta * (policy_GK - reference_GK)).masked_fill(~mask_GK, 0)


def _over_negatives(loss_GN: Tensor, mask_GK: Tensor) -> Tensor:
    """Mean over each group's negatives; 0 where there is none."""
    mask_GN = mask_GK[:, 1:]
    return loss_GN.masked_fill(~mask_GN, 0).sum(-1) / mask_GN.sum(-1).clamp(min=1)


def _exclude(reward_GK: Tensor, mask_GK: Tensor) -> Tensor:
    # A finite floor instead of −inf: logcumsumexp has no gradient through a run of infinities.
    return reward_GK.masked_fill(~mask_GK, torch.finfo(reward_GK.dtype).min / 4)
