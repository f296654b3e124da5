"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft: added to a model, and merged into its weights at the end."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cpo_pipe.data.config import Positive, Section
from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.text import nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), through peft."""

    r: Positive = Field(16, description="rank of the adapters")
    lora_alpha: Positive = Field(32, description="scale: the output of an adapter is multiplied by lora_alpha / r")
    target_modules: (
        Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = Field(
        "all-linear", description="layers that get an adapter, by name; `all-linear`: all except the output embedding"
    )


def add_adapters(name: str, model: "PreTrainedModel", lora: Lora, seed: int) -> "PeftModel":
    """Freeze the model and add adapters to its layers; at the start they change nothing.

    Raises:
        InputError: the model has no such layers, or one is an embedding whose weights are also the other embedding's.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    layers = [layer for layer, _ in model.named_modules()]
    # peft accepts a list if one of its names matches.
    for target in lora.target_modules if isinstance(lora.target_modules, list) else ():
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            hint = nearest(target, {layer.rpartition(".")[2] for layer in layers}) or "name layers of the model"
            raise InputError(f"train.{name}.lora.target_modules: the model has no layer {target}; {hint}")
    ends = _embeddings(model)
    settings: Any = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"train.{name}.lora.target_modules: {cause(error)}") from error
    tied = len({end.weight.data_ptr() for end in ends if end is not None}) == 1
    if tied and any(now is not before for now, before in zip(_embeddings(model), ends, strict=True)):
        raise InputError(
            f"train.{name}.lora.target_modules: {', '.join(lora.target_modules)} includes an embedding whose weights "
            "are both input and output of this model; an adapter merged into one would change the other; remove it"
        )
    adapted.eval()
    return adapted


def _embeddings(model: "PreTrainedModel") -> list[Any]:
    """Return the input and the output embedding."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
