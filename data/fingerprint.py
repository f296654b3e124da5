"""Content hashes: canonical JSON, hashes of rows, files and models, and the seed of a sampled row."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError, RunError, cause

log = logging.getLogger(__name__)

Spec = dict[str, Any]
"""The fields that determine the values of an artifact, and no others. Plain JSON values only."""

SAMPLES_PER_ROW = 1 << 16
"""Seeds of one example's samples are consecutive; each example has this many."""

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
    """Return one string per JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 32) -> str:
    """Return the first `length` hex digits of the SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def content_hash(spec: Spec) -> str:
    """Return the hash that names an artifact: 16 hex digits of its spec's SHA-256."""
    return digest(spec, 16)


def example_id(prompt: str, target: str, *, context: str = "", ends: bool = True) -> str:
    """Return a ground-truth pair's identity: the hash of its texts, and of whether the target is the text's real end.

    A context is kept apart from the prompt, and a cut target from a whole one, because their token ids differ.
    """
    return digest([prompt, target] if not context and ends else [prompt, target, context, ends])


def candidate_id(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Return a candidate's identity as the model sees it: the hash of the prompt's and the candidate's token ids."""
    return digest([list(prompt_ids), list(token_ids)])


def row_seed(seed: int, example_id: str) -> int:
    """Return the seed of sample 0 of an example; sample k uses `row_seed(...) + k`.

    H(seed, example_id) mod 2^45, times 2^16: below 2^61, because vLLM gives child k of a request seed + k and
    hangs on seeds near 2^64.
    """
    return (int(digest([seed, example_id], 16), 16) % (1 << 45)) * SAMPLES_PER_ROW


def hash_keys(keys: Iterable[Any]) -> str:
    """Return the hash of an ordered collection of row keys, without holding its JSON in memory."""
    state = hashlib.sha256()
    for key in keys:
        state.update(canonical_json(key).encode("utf-8", "surrogatepass"))
        state.update(b"\n")
    return state.hexdigest()[:32]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


UNCACHED_BYTES = 1 << 26
"""Smaller files, if they hold no weights, are read in every process."""
_CLOCK_TICK_NS = 50_000_000
"""A file that was written less than this ago may be written again without a change of its times."""
_hashes: dict[str, str] = {}
"""SHA-256 of the files that this process has read, by their stamps."""


def _stamp(path: Path) -> tuple[str, bool]:
    """Return what changes when a file is written or replaced, and whether enough time has passed to rely on it.

    `tar`, `rsync -t` and reproducible builds set the modification time; no program sets the change time.
    """
    status = path.stat()
    stamp = f"{path}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    return stamp, time.time_ns() - status.st_ctime_ns > _CLOCK_TICK_NS


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file, in hex. A process reads a file once, and again after it is written."""
    real = path.resolve()
    stamp, settled = _stamp(real)
    if stamp in _hashes:
        return _hashes[stamp]
    found = sha256_file(real)
    if settled:
        _hashes[stamp] = found
    return found


class FileHashes:
    """SHA-256 of files; of weights and large files cached on disk by path, size and times (30 GB take a minute).

    Size and times do not show a failing disk: `check_unchanged` a file before its content is used.
    """

    def __init__(self, cache: Path, write: Callable[[Path, bytes], None]):
        self._path = cache
        self._write = write
        self._cache = _read_cache(cache)

    def __call__(self, path: Path) -> str:
        """Return the SHA-256 of the file at `path`, in hex."""
        real = path.resolve()
        if real.suffix != ".safetensors" and real.stat().st_size < UNCACHED_BYTES:
            return sha256_once(real)
        stamp, settled = _stamp(real)
        cached_stamp, found = self._cache.get(str(real), ("", ""))
        if cached_stamp != stamp:
            found = sha256_once(real)
            if settled:
                self._cache[str(real)] = [stamp, found]
                self._save()
        return found

    def _save(self) -> None:
        if os.access(self._path.parent, os.W_OK):
            content = {"checksum": digest(self._cache), "files": self._cache}
            self._write(self._path, json.dumps(content, indent=0).encode())


def _read_cache(path: Path) -> dict[str, list[str]]:
    """Return the cached hashes; a damaged cache counts as empty."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        files: dict[str, list[str]] = content["files"]
        if content["checksum"] == digest(files):
            return files
    except (InputError, KeyError):
        pass
    log.warning("%s is damaged or of another version; the files are hashed again", path)
    return {}


def distrust(path: Path) -> None:
    """Change a file's change time, and nothing else, so that no cached hash of it is valid any more."""
    with suppress(OSError):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def check_unchanged(path: Path, recorded: str) -> None:
    """Refuse a file whose bytes no longer have the SHA-256 `recorded`; a process reads each file once.

    Raises:
        RunError: the SHA-256 differs.
    """
    found = sha256_once(path)
    if found == recorded:
        return
    distrust(path)
    if (path.parent / "manifest.json").is_file():
        remedy = "run the command again to quarantine it and make it again"
    else:
        remedy = "restore the file, or run the command again to use the new content as a model or data set of its own"
    raise RunError(f"{path}: damaged: its SHA-256 is {found[:16]}…, but {recorded[:16]}… was recorded for it; {remedy}")


def hash_weights(folder: Path, hash_file: Callable[[Path], str]) -> dict[str, str]:
    """Return the SHA-256 of each file of weights in a model's folder, by name."""
    return {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}


def model_fingerprint(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """Return the identity of a model: its safetensors and its architecture, never its name.

    Raises:
        InputError: the folder has no config.json or no *.safetensors.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"model {folder}: no config.json there; give a model folder or a hub name")
    weights = hash_weights(folder, hash_file)
    if not weights:
        raise InputError(
            f"model {folder}: no *.safetensors there; weights are read from safetensors only; `cpo-pipe convert` makes "
            "them from pickles and GGUF files"
        )
    config = read_json(folder / "config.json")
    for field in _CONFIG_PROVENANCE:
        config.pop(field, None)
    return digest({"config": config, "weights": [list(file) for file in weights.items()]})


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file of a model or tokenizer.

    Raises:
        InputError: the file does not hold a JSON object.
        FileNotFoundError: the file is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({cause(error)}); download or save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download or save the model again")
    return content


def tokenizer_fingerprint(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """Return the identity of a tokenizer: the content of its files.

    Raises:
        InputError: the folder has no tokenizer files.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise InputError(f"tokenizer {folder}: no tokenizer files there (such as tokenizer.json)")
    return digest([[file.name, hash_file(file)] for file in files])
