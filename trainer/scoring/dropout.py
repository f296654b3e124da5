"""Remove dropout: log-probs of policy and reference must depend on nothing but their weights."""

import copy
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel


def remove_dropout(model: PreTrainedModel) -> PreTrainedConfig:
    """Set every dropout probability of a model to zero, in its modules and in its configs.

    Eval mode alone is not enough: gradient checkpointing needs layers in training mode, and the layers of some models
    (OPT, XGLM, BioGPT, BART, Falcon, Doge) read that flag, and their probabilities, in their own forward pass.

    Returns:
        A copy of the original config, for the checkpoint.
    """
    before: PreTrainedConfig = copy.deepcopy(model.config)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
        config = getattr(module, "config", None)
        for one in _configs(config) if isinstance(config, PreTrainedConfig) else ():
            _zero(one)
    return before


def _zero(owner: nn.Module | PreTrainedConfig) -> None:
    # Dropout, layer drop and stochastic depth have "drop" in their names: attention_dropout, attn_pdrop, layerdrop.
    for name, value in vars(owner).items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(owner, name, type(value)(0))  # some configs are strict about int and float


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield the config and the configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)
