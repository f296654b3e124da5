"""Load a model and make sure that all its weights were there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_whole(name: str, folder: Path, **options: Any) -> "PreTrainedModel":
    """Return the model in a folder.

    transformers initializes tensors at random that it does not find.

    Args:
        name: of the model, for messages.
        folder: its folder.
        options: of `from_pretrained`.

    Raises:
        InputError: a tensor is missing or has another shape than config.json says.
    """
    from transformers import AutoModelForCausalLM

    # output_loading_info makes it return a pair, which transformers' types do not say.
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, report = pair
    if report["mismatched_keys"]:
        key, shape, expected = min(report["mismatched_keys"])
        raise InputError(
            f"model {name}: the tensor {key} has the shape {list(shape)}, but config.json expects {list(expected)}; "
            "give the config of these weights"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"model {name}: its weights lack {len(missing)} tensors of its architecture, such as {missing[0]}"
        )
    found: PreTrainedModel = model
    return found
