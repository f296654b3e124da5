"""The folder that a model's name leads to, downloaded from the hub where it is a hub name."""

from collections.abc import Sequence
from pathlib import Path

from cpo_pipe.data.errors import InputError, MissingInput, cause
from cpo_pipe.data.models import remote_code

_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "README.md")
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*"]
"""Copies of the same weights that some hub repositories carry."""


def fetch_folder(
    name: str, what: str, revision: str | None = None, *, make: bool = True, weights: Sequence[str] = _SAFETENSORS
) -> Path:
    """Return the folder that `name` (a folder or a hub name) leads to; a hub name is downloaded into the hub's cache.

    Of a hub model's weights only the files of the patterns `weights` are downloaded.

    Raises:
        InputError: neither a folder nor something the hub gives, or a model that asks to run code of its own.
        MissingInput: without `make`, where it would have to be downloaded.
    """
    if Path(name).is_dir():
        _check_code(name, what, Path(name))
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def download(patterns: Sequence[str]) -> Path:
        patterns = [*_FILES, *patterns]
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_OTHER_FORMATS,
            local_files_only=not make,
        )
        return Path(found)

    try:
        _check_code(name, what, download([]))
        return download(weights)
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{what} {name}: no such folder, and not a hub name") from error
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        if not make:
            raise MissingInput(f"{what} {name}: no such folder or training, and not downloaded from the hub") from error
        raise InputError(
            f"{what} {name}: no such folder or training, and the hub did not give it ({cause(error)})"
        ) from error


def _check_code(name: str, what: str, folder: Path) -> None:
    if what == "model":
        remote_code.check_causal_model(name, folder)
    elif what == "reward model":
        remote_code.check_reward_model(name, folder)
    elif what == "embedding model":
        remote_code.check_embedder(name, folder)
