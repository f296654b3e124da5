"""Overlap of held-out examples with training examples: equal texts, near-duplicates, common word n-grams.

The n-grams are those of Brown et al. 2020, appendix C: as many words as all but the shortest 5% of the held-out texts
have, but 8 to 13. One that more than 10 training examples have is a common phrase and is ignored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.data.progress import track
from cpo_pipe.pipeline.prepare.ngrams import Hashes, word_ngrams, words, words_digest

PARTS = ("prompt", "target")
FEWEST_WORDS, MOST_WORDS, SHORTEST_SHARE = 8, 13, 0.05
COMMON = 10
"""Training examples with an n-gram above which it is ignored."""
WARNED_SHARE = 0.01
"""Share of held-out examples with overlap above which it changes results by as much as systems differ."""

KINDS = ("equal", "near-duplicate", "n-gram")
"""The strongest first; an example counts in its strongest."""

LEAKAGE = pa.schema(
    [
        pa.field(name, kind, metadata={"doc": doc})
        for name, kind, doc in (
            ("split", pa.string(), "`validation` or `test`"),
            ("part", pa.string(), "`prompt` or `target`"),
            ("examples", pa.int64(), "examples of the split"),
            ("equal", pa.int64(), "examples whose text has the words of a training example's text"),
            ("near_duplicates", pa.int64(), "others that are in one group of near-duplicates with a training example"),
            ("ngrams", pa.int64(), "others that share an n-gram of words with 1 to 10 training examples"),
            ("n", pa.int64(), "words of an n-gram"),
            ("short", pa.int64(), "examples with fewer words: too short for an n-gram; such targets are not compared"),
            ("example", pa.string(), "the first example with the strongest overlap, and the training example"),
        )
    ]
)


@dataclass(frozen=True)
class Leaks:
    """What one part of the examples has in common over the boundary of the split."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    """A row of LEAKAGE for each split that is held out."""
    training: dict[int, tuple[str, int]] = field(default_factory=dict)
    """The training examples that overlap: kind, and an example that is held out."""


def find_leaks(
    part: str,
    texts: pa.ChunkedArray,
    sources: pa.ChunkedArray,
    splits: Mapping[str, Sequence[int]],
    groups: NDArray[np.int64],
) -> Leaks:
    """Compare the held-out examples with the training examples.

    Memory: 16 bytes for each word of the held-out texts; training texts are read one by one.

    Args:
        part: `prompt` or `target`.
        texts: this part of all examples.
        sources: the places of all examples, for messages.
        splits: the places in `texts` of the examples of each split.
        groups: the group of near-duplicates of each text: (N,).
    """
    training = np.sort(np.array(splits["train"], np.int64))
    names = [name for name in ("validation", "test") if len(splits.get(name, ()))]
    if not names or not len(training):
        return Leaks()
    held = np.concatenate([np.array(splits[name], np.int64) for name in names])
    with track(f"overlap of {part}s", len(held) + len(training), "texts") as meter:
        lengths = np.array([len(_plain(words(texts[row].as_py()))) for row in held.tolist()])
        n = int(np.clip(np.quantile(lengths, SHORTEST_SHARE), FEWEST_WORDS, MOST_WORDS))
        compared = np.ones(len(held), np.bool_) if part == "prompt" else lengths >= n
        found = _Overlap(texts, held[compared], n)
        meter.advance(len(held))
        for row in training.tolist():
            found.add(row, texts[row].as_py())
            meter.advance()
    found.add_groups(training, groups)
    witness = np.full((len(KINDS), len(held)), -1)
    witness[:, compared] = found.witnesses()
    figures, start = [], 0
    for name in names:
        end = start + len(splits[name])
        of_split = witness[:, start:end]
        strongest = np.where((of_split >= 0).any(axis=0), (of_split >= 0).argmax(axis=0), len(KINDS))
        counts = np.bincount(strongest, minlength=len(KINDS))
        example = None
        if counts[: len(KINDS)].any():
            place = int(strongest.argmin())
            own, other = sources[held[start + place]].as_py(), sources[of_split[strongest[place], place]].as_py()
            example = f"{own} ({KINDS[strongest[place]]}: {other})"
        figures.append(
            {
                "split": name, "part": part, "examples": end - start, "equal": int(counts[0]),
                "near_duplicates": int(counts[1]), "ngrams": int(counts[2]), "n": n,
                "short": int((lengths[start:end] < n).sum()), "example": example,
            }
        )  # fmt: skip
        start = end
    return Leaks(figures, found.training())


class _Overlap:
    """Takes training texts, and finds which held-out texts (H of them) overlap with them, in each way of KINDS."""

    def __init__(self, texts: pa.ChunkedArray, held: NDArray[np.int64], n: int):
        self._held, self._n = held, n
        self._digests: dict[bytes, list[int]] = {}
        ngrams: list[Hashes] = []
        for place, row in enumerate(held.tolist()):
            text = texts[row].as_py()
            sequence = words(text)
            self._digests.setdefault(words_digest(text, sequence), []).append(place)
            ngrams.append(word_ngrams(_plain(sequence), n))
        hashes = np.concatenate([np.empty(0, np.uint64), *ngrams])
        self._ngrams, inverse = np.unique(hashes, return_inverse=True)
        owners = np.repeat(np.arange(len(held)), [len(part) for part in ngrams])
        order = np.argsort(inverse, kind="stable")
        self._owners = owners[order]
        """The held-out texts of each n-gram, one n-gram after the other."""
        self._starts = np.searchsorted(inverse[order], np.arange(len(self._ngrams) + 1))
        self._counts = np.zeros(len(self._ngrams), np.int64)
        self._hits: list[tuple[int, NDArray[np.int64]]] = []
        self._training: list[dict[int, int]] = [{} for _ in KINDS]
        """Of each kind, the training texts with a held-out text that they overlap with."""
        self._witnesses = np.full((len(KINDS), len(held)), -1)

    def add(self, row: int, text: str) -> None:
        """Compare a training text."""
        sequence = words(text)
        if places := self._digests.get(words_digest(text, sequence)):
            self._record(0, row, places)
        ngrams = word_ngrams(_plain(sequence), self._n)
        places_of = np.searchsorted(self._ngrams, ngrams)
        inside = places_of < len(self._ngrams)
        hits = places_of[inside][self._ngrams[places_of[inside]] == ngrams[inside]]
        self._counts[hits] += 1
        hits = hits[self._counts[hits] <= COMMON]
        if len(hits):
            self._hits.append((row, hits))

    def add_groups(self, training: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
        """Take the groups of near-duplicates of all texts."""
        members: dict[int, list[int]] = {}
        for place, group in enumerate(groups[self._held].tolist()):
            members.setdefault(group, []).append(place)
        for row, group in zip(training.tolist(), groups[training].tolist(), strict=True):
            if group in members:
                self._record(1, row, members[group])

    def witnesses(self) -> NDArray[np.int64]:
        """Return for each kind and held-out text the first training text that overlaps with it, or −1: (3, H)."""
        for row, hits in self._hits:
            for ngram in hits[self._counts[hits] <= COMMON].tolist():
                self._record(2, row, self._owners[self._starts[ngram] : self._starts[ngram + 1]])
        return self._witnesses

    def training(self) -> dict[int, tuple[str, int]]:
        """Return the training texts that overlap: the strongest kind, and a held-out text."""
        kinds = reversed(list(zip(KINDS, self._training, strict=True)))
        return {row: (kind, int(self._held[place])) for kind, found in kinds for row, place in found.items()}

    def _record(self, kind: int, row: int, places: Sequence[int] | NDArray[np.int64]) -> None:
        self._training[kind].setdefault(row, int(places[0]))
        own = self._witnesses[kind]
        own[places] = np.where(own[places] < 0, row, own[places])


def _plain(sequence: Sequence[str]) -> list[str]:
    """Return the words without symbols: formulas of a few short numbers coincide without being copied."""
    return [word for word in sequence if word[0].isalnum()]


def leakage_warnings(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each split and part (rows of LEAKAGE) with so much overlap that it changes results."""
    for row in figures:
        counts = {"equal": row["equal"], "near-duplicates": row["near_duplicates"],
                  f"others with {row['n']} words in a row": row["ngrams"]}  # fmt: skip
        if sum(counts.values()) > WARNED_SHARE * row["examples"]:
            shown = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
            yield (
                f"{sum(counts.values()):,} of {row['examples']:,} {row['part']}s of the {row['split']} split overlap "
                f"with training examples ({shown}), for example {row['example']}: results on them may show "
                "what was memorized; set data.drop_leaks to true to remove these training examples"
            )
