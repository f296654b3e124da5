"""LoRA adapters (Hu et al. 2021) as peft saves them: added to the weights of their base, once, and then a model."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_pipe.data.errors import InputError, MissingInput, cause
from cpo_pipe.data.fingerprint import (
    TOKENIZER_FILES,
    check_unchanged,
    digest,
    model_fingerprint,
    read_json,
    sha256_file,
)
from cpo_pipe.data.models.end_tokens import end_tokens, name_end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, copy_tokenizer
from cpo_pipe.data.store import Artifact, ArtifactWriter, Store

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NOT_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
"""Fields of the config: the base is identified by its content, and the others do not change the weights."""


def base_of(name: str, folder: Path) -> tuple[str, str | None]:
    """Return the folder or hub name of the model that an adapter belongs to, and the revision there.

    Raises:
        InputError: its config names no base, it is not LoRA, it has no safetensors, or a model is in the same folder.
    """
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"model {name}: an adapter without {WEIGHTS}; save it again with peft's save_pretrained")
    if beside := sorted(file.name for file in folder.glob("*.safetensors") if file.name != WEIGHTS):
        raise InputError(f"model {name}: {WEIGHTS} and {beside[0]} are in one folder; move one to its own folder")
    if config.get("peft_type") != "LORA":
        raise InputError(f"model {name}: an adapter of the type {config.get('peft_type')}; only LORA can be merged")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"model {name}: {CONFIG} names no base_model_name_or_path; put the base model there")
    if (Path(base) / CONFIG).is_file():
        raise InputError(
            f"model {name}: its base {base} is an adapter itself; merge that one first, and name the result"
        )
    return base, config.get("revision")


def adapted(name: str, folder: Path, base: Model, store: Store, *, make: bool = True) -> Artifact:
    """Return the checkpoint of a base with an adapter added to its weights, in float32; make it if it is missing.

    Raises:
        InputError: peft is not installed, or the adapter does not belong to that base.
        MissingInput: without `make`, if it is missing.
    """
    config = {key: value for key, value in read_json(folder / CONFIG).items() if key not in _NOT_IDENTITY}
    tokenizer = folder if any((folder / file).is_file() for file in TOKENIZER_FILES) else base.path
    files = [[file, store.hash_file(tokenizer / file)] for file in TOKENIZER_FILES if (tokenizer / file).is_file()]
    ends = end_tokens(base.path, TokenizerFiles(tokenizer, "") if files else None)
    weights = store.hash_file(folder / WEIGHTS)
    spec = {"base": base.fingerprint, "adapter": digest([config, weights]),
            "tokenizer": digest(files), "end_tokens": list(ends)}  # fmt: skip
    artifact = store.artifact("checkpoints", spec)
    if not artifact.complete():
        if not make:
            raise MissingInput(f"model {name}: the adapter is not merged with {base.name} yet")
        if importlib.util.find_spec("peft") is None:
            raise InputError(f'model {name}: a LoRA adapter needs peft; run pip install "cpo-pipe[lora]"')

        def write(writer: ArtifactWriter) -> None:
            check_unchanged(folder / WEIGHTS, weights)
            with warnings.catch_warnings(action="ignore"):  # what peft only warns of is refused
                model = _merged(name, folder, base)
            name_end_tokens(model, ends)
            model.save_pretrained(writer.path)
            copy_tokenizer(tokenizer, writer.path)
            writer.facts["fingerprint"] = model_fingerprint(writer.path, sha256_file)

        if artifact.make(write):
            log.info("model %s: merged with %s into %s", name, base.name, artifact.name)
    return artifact


def _merged(name: str, folder: Path, base: Model) -> "PreTrainedModel":
    """Return the base with the adapter in its weights, after checking that it computes the same."""
    import torch

    model = _with_adapter(name, folder, base)
    ids = torch.arange(1, 17)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        expected = model(ids).logits
        whole: PreTrainedModel = model.merge_and_unload()
        error = float((whole(ids).logits - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:  # such as an adapter on an embedding that is both input and output
        raise InputError(
            f"model {name}: its adapter cannot be merged into {base.name}, whose logits are then off by {error:.1e} of "
            "the largest; name a model with the adapter merged already"
        )
    return whole


def _with_adapter(name: str, folder: Path, base: Model) -> "PeftModel":
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model: PeftModel = PeftModel.from_pretrained(base.load(torch.float32), folder)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"model {name}: the adapter does not fit its base {base.name} ({cause(error)})") from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        given = set(file.keys())
    taken = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd := sorted((taken - given) | {key for key in given - taken if "lora_" in key}):
        raise InputError(f"model {name}: the adapter does not fit its base {base.name}: only one of them has {odd[0]}")
    model.eval()
    return model
