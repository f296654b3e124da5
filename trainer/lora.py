"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft: put into a model, and merged into its weights at the end."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.recipe import Lora

if TYPE_CHECKING:
    from peft import PeftModel


def add_adapters(name: str, model: PreTrainedModel, lora: Lora, seed: int) -> "PeftModel":
    """Freeze the model and give its layers adapters, which start as no change at all.

    Raises:
        InputError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(f'train.{name}.lora: needs peft; run pip install "cpo-pipe[lora]"') from error
    settings: Any = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"train.{name}.lora.targets: {str(error).splitlines()[0][:200]}") from error
    adapted.eval()
    return adapted


def merged(adapted: "PeftModel") -> PreTrainedModel:
    """The model with its adapters added to its weights."""
    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole
