"""A tokenizer on disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, read_json, tokenizer_fingerprint
from cpo_pipe.data.models import remote_code
from cpo_pipe.data.models.fetch import fetch_folder
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk."""

    path: Path
    fingerprint: str

    def load(self) -> "PreTrainedTokenizerBase":
        """Return the loaded tokenizer.

        Raises:
            InputError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path,
                trust_remote_code=False,  # or else it would ask whether to
            )
        except Exception as error:  # the libraries' failures have no common type
            if "trust_remote_code" in str(error):
                raise remote_code.code_error(f"tokenizer {self.path}", "tokenizer_config.json") from error
            raise InputError(f"tokenizer {self.path}: cannot be loaded ({cause(error)})") from error
        return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files to the folder of a checkpoint."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def locate_tokenizer(name: str, store: Store) -> TokenizerFiles:
    """Return the tokenizer that a folder or hub name leads to.

    Raises:
        InputError: the tokenizer is missing, or it needs Python code of its own.
    """
    return tokenizer_in(fetch_folder(name, "tokenizer"), store)


def tokenizer_in(folder: Path, store: Store) -> TokenizerFiles:
    """Return the tokenizer in a folder.

    Raises:
        InputError: the tokenizer is missing, or it needs Python code of its own.
    """
    found = TokenizerFiles(folder, tokenizer_fingerprint(folder, store.hash_file))
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("auto_map"):
        found.load()  # transformers decides whether it needs the code
    return found


def check_vocabulary(model: Model, tokenizer: TokenizerFiles, store: Store) -> None:
    """Refuse a model if its own tokenizer reads the token ids of `tokenizer` differently.

    Only where both have a tokenizer.json; nothing is loaded.

    Raises:
        InputError: one of them has a token that is absent or another in the other.
    """
    files = [folder / "tokenizer.json" for folder in (model.path, tokenizer.path)]
    if not all(file.is_file() for file in files) or store.hash_file(files[0]) == store.hash_file(files[1]):
        return
    own, given = map(_tokens, files)
    if own != given:
        token_id = min(token_id for token_id in own.keys() | given.keys() if own.get(token_id) != given.get(token_id))
        raise InputError(
            f"data.tokenizer is not that of the model {model.name}: the token id {token_id} is "
            f"{given.get(token_id)!r} in the one and {own.get(token_id)!r} in the other; "
            "set data.tokenizer to the model's own"
        )


def _tokens(file: Path) -> dict[int, str]:
    """Return the tokens of a tokenizer.json, by id."""
    content = read_json(file)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, dict):
            tokens = {token_id: token for token, token_id in vocabulary.items()}
        else:  # Unigram: pairs of token and score, in the order of their ids
            tokens = dict(enumerate(token for token, _ in vocabulary))
        return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{file}: is not a valid tokenizer.json; download or save the model again") from error
