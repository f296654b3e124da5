"""What objectives share that prefer a group's target to its negatives.

Shapes: G groups, K candidates of the largest group, N = K − 1 negatives. Candidate 0 is the target. `mask_GK` is True
where a candidate exists. Groups of K = 1 have loss 0; callers exclude them from the mean. Objectives on pairs take the
target with each of its negatives, and the mean over these pairs: with K = 2 they are what their papers define.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from cpo_pipe.data.config import Location, Positive
from cpo_pipe.trainer.objectives.base import GroupFigures, Normalizers, Training
from cpo_pipe.trainer.objectives.mle import NEEDS_NEGATIVES, mle_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cpo_pipe.trainer.groups import Batch, Group
    from cpo_pipe.trainer.scoring.group_table import TokenGroup

ROUNDING = 1e-5
"""Relative difference that a log-prob may have from itself when it is summed in another batch."""


class GroupLosses(NamedTuple):
    """What an objective returns."""

    loss_G: Tensor
    """Loss per group, in nats."""
    reward_GK: Tensor
    """β (log π_θ − log π_ref), without a reference log π_θ; 0 where the mask is False."""


class PreferenceTraining(Training):
    """A training on groups of a target and its negatives.

    A subclass implements `preference_loss`. Without a reference model log π_ref is 0.
    """

    needs_ranks: ClassVar[bool] = False
    """Whether the loss depends on the order of a group's negatives."""

    negatives: dict[str, Positive] | None = Field(
        None,
        min_length=1,
        description="negatives per prompt of this training's own groups, by source (default: all of `negatives`)",
    )
    pairs: list[tuple[str, str]] | None = Field(
        None,
        min_length=1,
        description="train on these pairs of each group's candidates instead of the whole group, each [CHOSEN, "
        "REJECTED]: `target` or a source of negatives",
    )
    mle_weight: float = Field(0.0, ge=0, description="weight of the MLE loss, which is added")
    length_normalize: bool = Field(False, description="mean log-probs over a continuation's tokens instead of sums")

    @model_validator(mode="after")
    def _check_preference(self) -> Self:
        seen: set[frozenset[str]] = set()
        for chosen, rejected in self.pairs or ():
            if chosen == rejected:
                raise ValueError(f"pairs [{chosen}, {rejected}]: chosen and rejected must differ")
            if frozenset((chosen, rejected)) in seen:
                raise ValueError(f"pairs [{chosen}, {rejected}]: duplicate pair, perhaps in reverse; remove one")
            seen.add(frozenset((chosen, rejected)))
        by = self.curriculum.by if self.curriculum is not None else None
        if by is not None and by not in NEEDS_NEGATIVES:
            raise ValueError(
                f"curriculum.by is {by}, which measures targets alone; for the objective {self.objective} use "
                "strength, similarity or margin"
            )
        if by == "margin" and not isinstance(self, ReferenceTraining):
            raise ValueError(
                f"curriculum.by is margin, but {self.objective} has no reference model; use strength or similarity"
            )
        return self

    @property
    def sees_ranks(self) -> bool:
        """Whether the order of a group's negatives decides the loss; the order of a pair is given."""
        return self.needs_ranks and self.pairs is None

    @abstractmethod
    def preference_loss(self, policy_GK: Tensor, reference_GK: Tensor, batch: Batch) -> GroupLosses:
        """Return the loss and the rewards of each group.

        Args:
            policy_GK: log π_θ(y_j | x), summed over tokens, or their mean with `length_normalize`; in nats.
            reference_GK: log π_ref(y_j | x), likewise; 0 without a reference.
            batch: which candidates exist, their ranks and their tokens.
        """

    def texts(self, group: Group) -> TokenGroup:
        """Return the prompt and all candidates."""
        return group.prompt_ids, group.candidates

    def figures(self, groups: Sequence[Group], logprobs: Sequence[Tensor]) -> GroupFigures:
        """Return the loss of each group, differentiable, and its metrics."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from cpo_pipe.trainer.groups import collate

        nll_G = mle_loss(torch.stack([values[0] for values in logprobs]))
        zero_G = torch.zeros_like(nll_G)
        batch = collate(groups, nll_G.device)
        policy_GK, reference_GK = pad_sequence(list(logprobs), batch_first=True), batch.reference_GK
        drop_G = start_G = zero_G
        if isinstance(self, ReferenceTraining):
            drop_G = reference_GK[:, 0] + nll_G.detach()
            apart_GK = (policy_GK.detach() - reference_GK).abs() / batch.tokens_GK.sqrt()
            start_G = apart_GK.masked_fill(~batch.mask_GK, 0).amax(-1)
        if self.length_normalize:
            policy_GK, reference_GK = policy_GK / batch.tokens_GK, reference_GK / batch.tokens_GK
        losses = self.preference_loss(policy_GK, reference_GK, batch)
        if policy_GK.shape[1] == 1:
            return GroupFigures(nll_G, losses.loss_G, zero_G, zero_G, drop_G, zero_G)
        rewards = losses.reward_GK.detach()
        # Policy and reference may have been computed in other batches: equal sums of floats differ by about this much.
        scale_GK = self.beta * reference_GK if isinstance(self, ReferenceTraining) else rewards
        noise_G = ROUNDING * scale_GK.abs().amax(-1)
        several_G = batch.mask_GK[:, 1]
        accuracy_G = reward_accuracy(rewards, batch.mask_GK, noise_G).to(nll_G.dtype)
        return GroupFigures(
            nll_G,
            losses.loss_G,
            torch.where(several_G, accuracy_G, zero_G),
            torch.where(several_G, reward_margin(rewards, batch.mask_GK), zero_G),
            drop_G,
            torch.where(several_G, start_G, zero_G),
        )

    def loss(self, figures: GroupFigures, normalizers: Normalizers) -> Tensor:
        """Return what these groups add to the loss of their batch: the preference loss and the weighted MLE loss."""
        total = super().loss(figures, normalizers) * self.mle_weight
        if normalizers.groups_with_negatives:
            total = total + figures.preference_G.sum() / normalizers.groups_with_negatives
        return total

    def metrics(self, sums: GroupFigures, normalizers: Normalizers, batch: Sequence[Group]) -> dict[str, float]:
        """Return the metrics of a batch from the sums of its groups' figures."""
        row = super().metrics(sums, normalizers, batch)
        count = normalizers.groups_with_negatives or float("nan")
        preference_loss = float(sums.preference_G) / count
        return row | {
            "loss": self.mle_weight * row["loss"] + (preference_loss if normalizers.groups_with_negatives else 0.0),
            "preference_loss": preference_loss,
            "reward_accuracy": float(sums.accuracy_G) / count,
            "reward_margin": float(sums.margin_G) / count,
            "candidates": sum(len(group.candidates) for group in batch) / len(batch),
        }


class ReferenceTraining(PreferenceTraining):
    """A training whose rewards are relative to a frozen reference model: β (log π_θ − log π_ref)."""

    reference: Location = Field(description="the frozen reference model: a training's name, folder or hub name")
    beta: float = Field(5.0, gt=0, description="β of the reward β·(log π_θ − log π_ref)")

    def upstream(self) -> list[str]:
        """Return the names of the models that it needs: trainings, folders or hub names."""
        return [*super().upstream(), self.reference]

    def continued_from(self, model: str) -> Self:
        """Return the same training of the next iteration, whose init and reference are the model of the one before."""
        return self.model_copy(update={"init": model, "reference": model})

    def metrics(self, sums: GroupFigures, normalizers: Normalizers, batch: Sequence[Group]) -> dict[str, float]:
        """Return the metrics of a batch from the sums of its groups' figures."""
        row = super().metrics(sums, normalizers, batch)
        return row | {"target_drop_per_token": float(sums.drop_G) / normalizers.target_tokens}


# ── pure functions that losses are made of ───────────────────────────────────────────────────────────────────────────


def relative_rewards(policy_GK: Tensor, reference_GK: Tensor, mask_GK: Tensor, beta: float) -> Tensor:
    """Return β (log π_θ − log π_ref) of each candidate, and 0 where the mask is False."""
    return (beta * (policy_GK - reference_GK)).masked_fill(~mask_GK, 0)


def mean_over_negatives(loss_GN: Tensor, mask_GK: Tensor) -> Tensor:
    """Return the mean over each group's negatives, and 0 for a group without one."""
    mask_GN = mask_GK[:, 1:]
    return loss_GN.masked_fill(~mask_GN, 0).sum(-1) / mask_GN.sum(-1).clamp(min=1)


def excluded(reward_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Return the rewards with a floor where the mask is False, so that its share of a softmax is 0."""
    import torch

    # A finite floor instead of −inf: logcumsumexp has no gradient through a run of infinities.
    return reward_GK.masked_fill(~mask_GK, torch.finfo(reward_GK.dtype).min / 4)


def reward_accuracy(reward_GK: Tensor, mask_GK: Tensor, noise_G: Tensor | float = 0.0) -> Tensor:
    """Return for each group whether the target's reward exceeds all others by more than `noise_G`."""
    return reward_GK[:, 0] > excluded(reward_GK, mask_GK)[:, 1:].amax(-1) + noise_G


def reward_margin(reward_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Return the target's reward less the mean reward of its negatives, for groups of K ≥ 2."""
    return reward_GK[:, 0] - (reward_GK[:, 1:] * mask_GK[:, 1:]).sum(-1) / mask_GK[:, 1:].sum(-1)
