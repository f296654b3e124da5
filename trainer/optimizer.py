"""What AdamW is given: which parameters decay, and the learning rate of each step."""

import math
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from cpo_pipe.trainer.objectives.base import Training

_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of biases and norms, in lower case: those of transformers' Trainer, which TRL's trainers use too."""


def parameter_groups(model: nn.Module, config: Training) -> list[dict[str, Any]]:
    """Return the trained parameters as AdamW takes them, with their weight decay.

    Biases and the parameters of norms decay only with `config.decay_biases_and_norms`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, _ in trained}
    if not config.decay_biases_and_norms:
        decayed &= set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))  # type: ignore[no-untyped-call]
    groups = [
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": config.weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(config: Training, step: int) -> float:
    """Return the share of the peak learning rate at a step (from 0), as transformers' `get_scheduler` does.

    With a warm-up the first step's is 0.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return 1.0
    left = (config.max_steps - step) / max(config.max_steps - config.warmup_steps, 1)
    return left if config.lr_scheduler_type == "linear" else 0.5 * (1 - math.cos(math.pi * left))
