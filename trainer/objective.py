"""From the log-probs of some groups to their share of a batch's loss.

Shapes: G groups of one forward pass, K candidates of the largest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpo_pipe.data.recipe import Training
from cpo_pipe.trainer.groups import Batch, Group, collate
from cpo_pipe.trainer.losses import (
    GroupLosses,
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    margin,
    mle_loss,
    ranked_cpo_loss,
    slic_loss,
    won,
)

ROUNDING = 1e-5
"""Relative difference that a log-prob may have from itself when it is summed in another batch."""


class GroupFigures(NamedTuple):
    """Of each group; what has no meaning for a group of K = 1 is 0 there."""

    nll_G: Tensor
    """−log π_θ(target), summed over its tokens."""
    contrast_G: Tensor
    """The objective's loss of the target against its negatives."""
    won_G: Tensor
    margin_G: Tensor
    drop_G: Tensor
    """log π_ref(target) − log π_θ(target), summed over its tokens; 0 without a reference."""
    start_G: Tensor
    """What shows whether policy and reference are one model: the largest |log π_θ − log π_ref| of a candidate, in nats
    per square root of a token, as rounding errors grow; 0 without a reference. Not differentiable."""


class Normalizers(NamedTuple):
    """What sums over a whole batch are divided by, so that means are exact however it is cut."""

    target_tokens: int
    contrasted: int
    """Groups with K ≥ 2; 0 for mle."""

    @staticmethod
    def of(config: Training, batch: Sequence[Group]) -> "Normalizers":
        """Of a whole batch, over all processes."""
        contrasted = sum(len(group.candidates) > 1 for group in batch) if config.contrasts else 0
        return Normalizers(sum(len(group.candidates[0]) for group in batch), contrasted)


def texts(config: Training, group: Group) -> tuple[list[int], list[list[int]]]:
    """What the model is asked for: without negatives the target alone."""
    return group.prompt_ids, group.candidates if config.contrasts else group.candidates[:1]


def figures(config: Training, groups: Sequence[Group], logprobs: Sequence[Tensor]) -> GroupFigures:
    """The objective of each group, differentiable, and what is worth knowing of it.

    Args:
        config: objective, β and length normalization.
        groups: G of them.
        logprobs: of each group's candidates, summed over tokens; without negatives those of the target, given each
            sequence of inputs.
    """
    zero_G = torch.zeros(len(logprobs), device=logprobs[0].device)
    if not config.contrasts:
        nll_G = mle_loss(torch.stack([values.mean() for values in logprobs]))
        return GroupFigures(nll_G, zero_G, zero_G, zero_G, zero_G, zero_G)
    nll_G = mle_loss(torch.stack([values[0] for values in logprobs]))
    batch = collate(groups, nll_G.device)
    policy_GK, reference_GK = pad_sequence(list(logprobs), batch_first=True), batch.reference_GK
    drop_G = reference_GK[:, 0] + nll_G.detach() if config.reference is not None else zero_G
    start_G = _start(policy_GK.detach(), batch) if config.reference is not None else zero_G
    if config.length_normalize:
        policy_GK, reference_GK = policy_GK / batch.tokens_GK, reference_GK / batch.tokens_GK
    losses = _contrast(config, policy_GK, reference_GK, batch)
    if policy_GK.shape[1] == 1:
        return GroupFigures(nll_G, losses.loss_G, zero_G, zero_G, drop_G, zero_G)
    rewards = losses.reward_GK.detach()
    # Policy and reference may have been computed in other batches: equal sums of floats differ by about this much.
    noise_G = ROUNDING * (config.beta * reference_GK if config.reference is not None else rewards).abs().amax(-1)
    several_G = batch.mask_GK[:, 1]
    won_G = won(rewards, batch.mask_GK, noise_G).to(nll_G.dtype)
    return GroupFigures(
        nll_G,
        losses.loss_G,
        torch.where(several_G, won_G, zero_G),
        torch.where(several_G, margin(rewards, batch.mask_GK), zero_G),
        drop_G,
        torch.where(several_G, start_G, zero_G),
    )


def _start(policy_GK: Tensor, batch: Batch) -> Tensor:
    off_GK = (policy_GK - batch.reference_GK).abs() / batch.tokens_GK.sqrt()
    return off_GK.masked_fill(~batch.mask_GK, 0).amax(-1)


def _contrast(config: Training, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
    """The objective's loss of each group."""
    pairs = policy_GK, reference_GK, batch.mask_GK
    match config.objective:
        case "cpo":
            return cpo_loss(*pairs, beta=config.beta)
        case "cpo-ranked":
            return ranked_cpo_loss(policy_GK, reference_GK, batch.rank_GK, batch.mask_GK, beta=config.beta)
        case "dpo":
            return dpo_loss(*pairs, beta=config.beta, label_smoothing=config.label_smoothing)
        case "slic":
            return slic_loss(policy_GK, batch.mask_GK, margin=config.margin)
        case "apo-zero":
            return apo_zero_loss(*pairs, beta=config.beta)
        case "apo-down":
            return apo_down_loss(*pairs, beta=config.beta)
        case "mle" | "pss":
            raise AssertionError(f"{config.objective} has no negatives")


def loss(config: Training, figures: GroupFigures, normalizers: Normalizers) -> Tensor:
    """What these groups add to the loss of their batch."""
    mle_weight = config.mle_weight if config.contrasts else 1.0
    total = figures.nll_G.sum() / normalizers.target_tokens * mle_weight
    if normalizers.contrasted:
        total = total + figures.contrast_G.sum() / normalizers.contrasted
    return total


def metrics(config: Training, sums: GroupFigures, normalizers: Normalizers, batch: Sequence[Group]) -> dict[str, float]:
    """The figures of a batch, from their sums over all of its groups."""
    mle = float(sums.nll_G) / normalizers.target_tokens
    row = {
        "loss": mle,
        "target_logprob": -float(sums.nll_G) / len(batch),
        "target_logprob_per_token": -mle,
    }
    if config.contrasts:
        several = normalizers.contrasted or float("nan")
        contrast = float(sums.contrast_G) / several
        row |= {
            "loss": config.mle_weight * mle + (contrast if normalizers.contrasted else 0.0),
            "contrast": contrast,
            "won": float(sums.won_G) / several,
            "margin": float(sums.margin_G) / several,
            "candidates": sum(len(group.candidates) for group in batch) / len(batch),
        }
        if config.reference is not None:
            row["target_drop_per_token"] = float(sums.drop_G) / normalizers.target_tokens
    return row
