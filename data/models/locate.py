"""The model that a name leads to; a LoRA adapter is merged with its base first."""

from pathlib import Path

from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.fingerprint import hash_weights, model_fingerprint
from cpo_pipe.data.models import lora
from cpo_pipe.data.models.fetch import fetch_folder
from cpo_pipe.data.models.model import Model, check_weights, checkpoint_model
from cpo_pipe.data.store import Store


def locate_model(name: str, store: Store, revision: str | None = None, *, make: bool = True) -> Model:
    """Return the model that a folder or hub name leads to; merge a LoRA adapter with its base in the store.

    Raises:
        InputError: no such model, its files are damaged, or the base of an adapter is missing.
        MissingInput: without `make`, where it would have to be downloaded or made.
    """
    folder = fetch_folder(name, "model", revision, make=make)
    if not make and not Path(name).is_dir() and not any(folder.glob("*.safetensors")):
        raise MissingInput(f"model {name}: its weights are not downloaded from the hub")
    check_weights(folder)
    if (folder / lora.CONFIG).is_file():
        base = _base_model(name, folder, store, make)
        artifact = lora.adapted(name, folder, base, store, make=make)
        return checkpoint_model(name, artifact)
    weights = hash_weights(folder, store.hash_file)
    return Model(name, folder, model_fingerprint(folder, store.hash_file), weights)


def _base_model(name: str, adapter: Path, store: Store, make: bool) -> Model:
    base, revision = lora.base_of(name, adapter)
    try:
        return locate_model(base, store, revision, make=make)
    except MissingInput:
        raise
    except InputError as error:
        raise InputError(f"model {name}: the base of this adapter: {error}; correct {lora.CONFIG}") from error
