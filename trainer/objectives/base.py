"""What all trainings share: their settings, and what an objective implements.

Shapes: G groups of one forward pass, K candidates of the largest group. Candidate 0 is the target.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cpo_pipe.data.config import Location, Positive, Section, Seed
from cpo_pipe.data.models.model import ScratchModel
from cpo_pipe.trainer.curriculum import Curriculum
from cpo_pipe.trainer.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from cpo_pipe.trainer.groups import Group
    from cpo_pipe.trainer.scoring.group_table import TokenGroup
    from cpo_pipe.trainer.scoring.prefix_tree import Packed


StopReason = Literal["saturation", "divergence"]


class GroupFigures(NamedTuple):
    """The loss of each group and its metrics; 0 where a figure needs negatives and the group has none."""

    nll_G: Tensor
    """−log π_θ(target), summed over its tokens, in nats."""
    preference_G: Tensor
    """The objective's loss of the target against its negatives."""
    accuracy_G: Tensor
    """1 where the target has the highest reward."""
    margin_G: Tensor
    """The target's reward less the mean reward of its negatives."""
    drop_G: Tensor
    """log π_ref(target) − log π_θ(target), summed over its tokens; 0 without a reference."""
    start_G: Tensor
    """Largest |log π_θ − log π_ref| of a candidate, in nats per square root of a token, as rounding errors grow. It is
    near 0 where policy and reference are one model; 0 without a reference. Not differentiable."""


class Normalizers(NamedTuple):
    """What sums over a whole batch are divided by, so that its means do not depend on how it is cut into passes."""

    target_tokens: int
    groups_with_negatives: int

    @staticmethod
    def of(batch: Sequence[Group]) -> Normalizers:
        """Return those of a whole batch, over all processes."""
        targets = sum(len(group.candidates[0]) for group in batch)
        return Normalizers(targets, sum(len(group.candidates) > 1 for group in batch))


class Training(Section):
    """One named training: the settings of all objectives, with the paper's values as defaults.

    An objective is a subclass. It declares its own settings as fields, and the first line of its docstring describes
    it. A subclass of `MLE` learns from targets alone, one of `PreferenceTraining` or `ReferenceTraining` from targets
    and negatives; the guide has an example (docs/guide/custom-objective.md).
    """

    citation: ClassVar[str] = ""
    """The paper that proposes the objective, for the model card."""
    lowers_target: ClassVar[bool] = False
    """Whether the objective makes the target less likely on purpose; then nothing warns of it."""

    init: Location | ScratchModel = Field(
        description="initial model: a training's name, a folder, a hub name, or a scratch model"
    )
    objective: str = Field(description="objective: a name, or a class of your own as module:Class")
    curriculum: Curriculum | None = Field(None, description="easy groups first (default: shuffled)")
    max_steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(64, description="groups (for mle and pss: examples) per optimizer step")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay")
    decay_biases_and_norms: bool = Field(
        False, description="apply weight_decay to biases and norms, too (transformers' Trainer and TRL do not)"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's ε")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up from 0, as in transformers: the first step's learning rate is 0"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="clip gradients to this norm (default: no clipping)")
    seed: Seed = Field(0, description="seed of the data order")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of the arithmetic; bfloat16 is autocast, and the weights stay float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each layer twice instead of keeping it for the backward pass; changes no value"
    )
    lora: Lora | None = Field(None, description="train low-rank adapters, merged into the weights at the end")
    validation: int = Field(
        0,
        ge=0,
        description="groups (for mle and pss: examples) that are not trained on, and measured every eval_steps steps",
    )
    eval_steps: Positive = Field(
        100,
        description="steps between two measurements of validation loss and of the repetition in sampled text; the "
        "first is before any step, the last after all",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="`last`: the weights after the last step; `best`: the measured weights, the initial ones included, "
        "with the lowest validation loss",
    )
    stop_on: list[StopReason] = Field(
        default_factory=list,
        description="end the training, with the weights of that step, once its loss is 0 (`saturation`) or exceeds its "
        "start (`divergence`); both are warned of in any case",
    )
    attention: Literal["auto", "cascade", "split", "flex", "dense", "packed", "padded"] = Field(
        "auto",
        description="attention backend, which computes a group's shared tokens once (mle: packs sequences); `auto` "
        "takes the first that a self-check finds numerically equivalent; does not change the result",
    )
    micro_batch_tokens: Positive | Literal["auto"] = Field(
        "auto",
        description="tokens per forward pass where several groups fit into one (`auto`: 8192 on a GPU, 2048 on a CPU); "
        "does not change the result",
    )
    logits_mb: Positive = Field(
        1024,
        description="MiB of logits kept between forward and backward pass; others are computed again; does not "
        "change the result",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="trackers that also get the metrics of each step, through accelerate"
    )

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        curriculum = self.curriculum
        if curriculum is not None and curriculum.order == "staged" and self.max_steps < curriculum.stages:
            raise ValueError(
                f"max_steps is {self.max_steps}, but curriculum.stages is {curriculum.stages}: the hardest groups "
                "would never be trained on; raise max_steps, or lower stages"
            )
        if self.keep == "best" and not self.validation:
            raise ValueError("keep is best, which needs a validation loss, but validation is 0; raise validation")
        return self

    def upstream(self) -> list[str]:
        """Return the names of the models that it needs: trainings, folders or hub names."""
        return [self.init] if isinstance(self.init, str) else []

    def continued_from(self, model: str) -> Self:
        """Return the same training of the next iteration, which starts from the model of the one before."""
        return self.model_copy(update={"init": model})

    # ── what the loop asks of an objective ───────────────────────────────────────────────────────────────────────

    def texts(self, group: Group) -> TokenGroup:
        """Return the prompt and the candidates whose log-probs `figures` needs; here the target alone."""
        return group.prompt_ids, group.candidates[:1]

    def largest_texts(self, group: Group) -> TokenGroup:
        """Return the texts of the group's largest forward pass, from which passes are planned."""
        return self.texts(group)

    def inputs(
        self, groups: Sequence[Group], step: int | None, pack: Callable[..., Packed], draw: Callable[..., Tensor]
    ) -> Packed:
        """Return the input of a forward pass over groups.

        Args:
            groups: G of them.
            step: the optimizer step; None where the loss is only measured.
            pack: makes the input from texts and, where other tokens are predicted than they have, labels.
            draw: draws tokens from the policy for an input and uniform numbers; see `Scorer.forward`.
        """
        return pack([self.texts(group) for group in groups])

    @abstractmethod
    def figures(self, groups: Sequence[Group], logprobs: Sequence[Tensor]) -> GroupFigures:
        """Return the loss of each group, differentiable, and its metrics.

        Args:
            groups: G of them.
            logprobs: log π_θ of each group's candidates, summed over tokens, in nats: G tensors of shape (K_g,).
        """

    def loss(self, figures: GroupFigures, normalizers: Normalizers) -> Tensor:
        """Return what these groups add to the loss of their batch."""
        return figures.nll_G.sum() / normalizers.target_tokens

    def metrics(self, sums: GroupFigures, normalizers: Normalizers, batch: Sequence[Group]) -> dict[str, float]:
        """Return the metrics of a batch from the sums of its groups' figures."""
        loss = float(sums.nll_G) / normalizers.target_tokens
        return {"loss": loss, "target_logprob": -float(sums.nll_G) / len(batch), "target_logprob_per_token": -loss}
