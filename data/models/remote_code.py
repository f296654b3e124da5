"""Refuse models that ask to run code of their own.

transformers, sentence-transformers and vLLM can run Python files and attention kernels that a model's JSON files name.
cpo-pipe runs none of them: it reads these files when it locates a model, before it downloads or loads any weights.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import read_json

_KERNEL_KEYS = ("_implementation", "_implementation_internal")
"""How the config keys end that choose the attention or experts implementation."""
_ARCHITECTURES = {
    "model": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "reward model": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
"""Where transformers lists the architectures that it has itself."""


def code_error(what: str, file: str) -> InputError:
    """Return the error for a model or tokenizer that works only with Python code of its own."""
    return InputError(
        f"{what}: {file} asks to run Python code that comes with the model, and cpo-pipe runs no such code; "
        "use a model that transformers supports without trust_remote_code"
    )


def check_code(name: str, what: str, folder: Path) -> None:
    """Check that a model runs without code of its own; a tokenizer is checked where it is loaded.

    Args:
        name: as the recipe calls it.
        what: `model`, `reward model`, `embedding model` or `tokenizer`.
        folder: where its files are.

    Raises:
        InputError: a JSON file needs Python code of the model, or names a kernel to download; or one of an embedding
            model names a class outside of sentence-transformers and torch.
    """
    if what == "embedding model":
        _check_embedder(f"{what} {name}", folder)
    elif what in _ARCHITECTURES and (folder / "config.json").is_file():
        _check_config(f"{what} {name}", folder / "config.json", _ARCHITECTURES[what])


def _check_embedder(what: str, folder: Path) -> None:
    """Check all modules of a sentence-transformers model."""
    if (folder / "modules.json").is_file():
        try:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            classes = [str(module["type"]) for module in modules]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{what}: modules.json lists no modules; download the model again") from error
        _check_classes(what, "modules.json", classes, "sentence_transformers.")
    names = ("config.json", "router_config.json", "sentence_*config.json")
    for file in sorted(file for name in names for file in folder.rglob(name)):
        config = _check_config(what, file, "MODEL_MAPPING_NAMES")
        if isinstance(types := config.get("types"), dict):  # of a router, whose branches are modules
            _check_classes(what, file.name, types.values(), "sentence_transformers.")
        activation = config.get("activation_function")
        if isinstance(activation, str) and "." in activation:  # of a dense layer; an architecture's has a plain name
            _check_classes(what, file.name, [activation], "torch.")


def kernel_fault(config: Any) -> str | None:
    """Return what is wrong with a config that names a kernel on the hub, at any depth; None if it names none."""
    for key, value in _settings(config):
        for named in value.values() if isinstance(value, dict) else [value]:
            if key.endswith(_KERNEL_KEYS) and isinstance(named, str) and "/" in named:
                return f"sets {key} to {named!r}, a kernel that would be downloaded and run; remove {key}"
    return None


def _check_config(what: str, file: Path, architectures: str) -> dict[str, Any]:
    """Return the config in a file, if it asks for no code."""
    try:
        config = read_json(file)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if config.get("auto_map") and file.name == "config.json":
        from transformers.models.auto import modeling_auto

        # Where transformers has the architecture itself, it ignores the model's own code.
        if config.get("model_type") not in getattr(modeling_auto, architectures):
            raise code_error(what, file.name)
    if fault := kernel_fault(config):
        raise InputError(f"{what}: {file.name} {fault}")
    return config


def _check_classes(what: str, file: str, classes: Any, package: str) -> None:
    for name in classes:
        if not str(name).startswith(package):
            raise code_error(what, f"{file} ({name!r})")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a JSON value with their values, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _settings(item)
