"""Models by content: where a name leads, and what the weights and the tokenizer there are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import model_fingerprint, tokenizer_fingerprint
from cpo_pipe.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Model:
    """A causal language model on disk."""

    name: str
    """As the recipe calls it; for messages only."""
    path: Path
    """Folder with config.json, *.safetensors and, where it has one, its tokenizer."""
    fingerprint: str
    """Hash of weights and architecture."""

    def context(self) -> int | None:
        """Positions the model can attend to, in tokens; None where its config names no limit."""
        config = json.loads((self.path / "config.json").read_text())
        for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(config.get(field), int):
                return int(config[field])
        return None


def fetch_folder(name: str, what: str) -> Path:
    """The folder that `name` (a folder or a hub name) leads to; a hub name is downloaded into the hub's cache.

    Raises:
        InputError: neither a folder nor something the hub gives.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except HFValidationError as error:
        raise InputError(f"{what} {name}: no such folder, and not a hub name") from error
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{what} {name}: no such folder or training, and the hub did not give it ({reason})"
        ) from error


def locate_model(name: str, store: Store) -> Model:
    """The model that a folder or hub name leads to."""
    folder = fetch_folder(name, "model")
    return Model(name, folder, model_fingerprint(folder, store.hash_file))


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk."""

    path: Path
    fingerprint: str

    def load(self) -> "PreTrainedTokenizerBase":
        """The tokenizer itself."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        return tokenizer


def locate_tokenizer(name: str, store: Store) -> TokenizerFiles:
    """The tokenizer that a folder or hub name leads to."""
    folder = fetch_folder(name, "tokenizer")
    return TokenizerFiles(folder, tokenizer_fingerprint(folder, store.hash_file))
