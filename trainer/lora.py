"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft: put into a model, and merged into its weights at the end."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.recipe import Lora, nearest

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
    layers = [layer for layer, _ in model.named_modules()]
    for target in lora.targets if isinstance(lora.targets, list) else ():  # peft is content with one that is there
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            hint = nearest(target, {layer.rpartition(".")[2] for layer in layers}) or "name layers of the model"
            raise InputError(f"train.{name}.lora.targets: the model has no layer {target}; {hint}")
    ends = _embeddings(model)
    settings: Any = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"train.{name}.lora.targets: {cause(error)}") from error
    tied = len({end.weight.data_ptr() for end in ends if end is not None}) == 1
    if tied and any(now is not before for now, before in zip(_embeddings(model), ends, strict=True)):
        raise InputError(
            f"train.{name}.lora.targets: {', '.join(lora.targets)} takes in an embedding whose weights are input and "
            "output of this model at once: merged for the one, an adapter would change the other; leave it out"
        )
    adapted.eval()
    return adapted


def _embeddings(model: PreTrainedModel) -> list[Any]:
    """The input and the output embedding."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]


def merged(adapted: "PeftModel") -> PreTrainedModel:
    """The model with its adapters added to its weights."""
    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole
