"""The folder that a model's name leads to, downloaded from the hub where it is a hub name."""

from collections.abc import Sequence
from pathlib import Path

from cpo_pipe.data.errors import InputError, MissingInput, cause
from cpo_pipe.data.models.remote_code import check_code

_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "README.md")
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*"]
"""Copies of the same weights that some hub repositories carry."""
HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""


def fetch_folder(
    name: str, what: str, revision: str | None = None, *, make: bool = True, weights: Sequence[str] = _SAFETENSORS
) -> Path:
    """Return the folder that `name` (a folder or a hub name) leads to; a hub name is downloaded into the hub's cache.

    Of a hub model's weights only the files of the patterns `weights` are downloaded.

    Raises:
        InputError: neither a folder nor something the hub gives, or a model that asks to run code of its own.
        MissingInput: without `make`, where it would have to be downloaded.
    """
    if what == "model" and _is_gguf(Path(name)):
        raise InputError(f"model {name}: is in GGUF; run `cpo-pipe convert {name} --out FOLDER` and give that folder")
    if Path(name).is_dir():
        check_code(name, what, Path(name))
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
        check_code(name, what, download([]))
        return download(weights)
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{what} {name}: no such folder, and not a hub name") from error
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        if not make:
            raise MissingInput(f"{what} {name}: no such folder or training, and not downloaded from the hub") from error
        raise _not_given(name, what, error) from error


def check_exists(name: str, what: str) -> Path | None:
    """Refuse a name that leads to nothing. The hub is only asked whether it has it; nothing is downloaded.

    Returns:
        The folder; None if it would have to be downloaded from the hub.

    Raises:
        InputError: neither a folder nor something the hub has, or a model that asks to run code of its own.
    """
    try:
        return fetch_folder(name, what, make=False)
    except MissingInput:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(name, timeout=HUB_SECONDS)
        except Exception as error:  # as in `fetch_folder`
            raise _not_given(name, what, error) from error
        return None


def _not_given(name: str, what: str, error: Exception) -> InputError:
    hint = "" if _answered(error) else "; without a network give a folder, or start from scratch (docs/install.md)"
    return InputError(f"{what} {name}: no such folder or training, and the hub did not give it ({cause(error)}){hint}")


def _answered(error: BaseException | None) -> bool:
    """Return whether the hub answered, though with an error."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return True
        error = error.__cause__
    return False


def _is_gguf(path: Path) -> bool:
    """Return whether this is a GGUF file or a folder that contains one in place of a model."""
    folder_of_gguf = path.is_dir() and any(path.glob("*.gguf")) and not (path / "config.json").is_file()
    return folder_of_gguf or (path.suffix == ".gguf" and path.is_file())
