"""Content addresses: canonical JSON, hashes of rows, files and models, and the seed of a sampled row."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError

Spec = dict[str, Any]
"""The fields that decide an artifact's values, and none that don't. Plain JSON values only."""

SAMPLES_PER_ROW = 1 << 16
"""Seeds of one example's samples are consecutive; this many are set aside for each example."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)

# Provenance that `save_pretrained` writes into config.json; it does not change what the model computes.
_CONFIG_PROVENANCE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def canonical_json(value: Any) -> str:
    """One string per JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 32) -> str:
    """First `length` hex digits of the SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def address(spec: Spec) -> str:
    """The address of an artifact: 16 hex digits of its spec's hash."""
    return digest(spec, 16)


def example_id(prompt: str, target: str, *, context: str = "", ends: bool = True) -> str:
    """Identity of a ground-truth pair: the hash of its texts, and of whether the target is the text's real end.

    A context is kept apart from the prompt, and a cut target from a whole one, because their token ids differ.
    """
    return digest([prompt, target] if not context and ends else [prompt, target, context, ends])


def candidate_id(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Identity of a candidate as the model sees it: the hash of the prompt's and the candidate's token ids."""
    return digest([list(prompt_ids), list(token_ids)])


def row_seed(seed: int, example_id: str) -> int:
    """Seed of sample 0 of an example; sample k uses `row_seed(...) + k`.

    H(seed, example_id) mod 2^45, times 2^16: below 2^61, because vLLM gives child k of a request seed + k and
    hangs on seeds near 2^64.
    """
    return (int(digest([seed, example_id], 16), 16) % (1 << 45)) * SAMPLES_PER_ROW


def hash_keys(keys: Iterable[Any]) -> str:
    """Hash of an ordered collection of row keys, without holding its JSON in memory."""
    state = hashlib.sha256()
    for key in keys:
        state.update(canonical_json(key).encode("utf-8", "surrogatepass"))
        state.update(b"\n")
    return state.hexdigest()[:32]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """SHA-256 of files, memoized on disk by path, size and modification time (hashing 30 GB takes minutes)."""

    def __init__(self, memo: Path, write: Callable[[Path, bytes], None]):
        self._memo_path = memo
        self._write = write
        self._memo: dict[str, str] = {}
        if memo.exists():
            try:
                self._memo = json.loads(memo.read_text())
            except ValueError:  # a memo is only a memo: a damaged one is made again
                self._memo = {}

    def __call__(self, path: Path) -> str:
        """SHA-256 of the file at `path`, in hex."""
        real = path.resolve()
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
        if key not in self._memo:
            self._memo[key] = sha256_file(real)
            if os.access(self._memo_path.parent, os.W_OK):
                self._write(self._memo_path, json.dumps(self._memo, indent=0).encode())
        return self._memo[key]


def model_fingerprint(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """Identity of a model: its safetensors and its architecture, never its name.

    Raises:
        InputError: the folder has no config.json or no *.safetensors.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"model {folder}: no config.json there; give a model folder or a hub name")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"model {folder}: no *.safetensors there; weights are read from safetensors only "
            "(save the model again with save_pretrained)"
        )
    config = read_json(folder / "config.json")
    for field in _CONFIG_PROVENANCE:
        config.pop(field, None)
    return digest({"config": config, "weights": [[file.name, hash_file(file)] for file in weights]})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model or tokenizer.

    Raises:
        InputError: there is none in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download or save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download or save the model again")
    return content


def tokenizer_fingerprint(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """Identity of a tokenizer: the content of its files.

    Raises:
        InputError: the folder has none.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise InputError(f"tokenizer {folder}: no tokenizer files there (such as tokenizer.json)")
    return digest([[file.name, hash_file(file)] for file in files])
