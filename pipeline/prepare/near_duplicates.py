"""Groups of near-duplicate texts: MinHash finds candidates, the exact Jaccard similarity of their bigrams decides.

Sources: Broder 1997 (MinHash), Leskovec et al., Mining of Massive Datasets, chapter 3 (banding), Lee et al. 2022
(near-duplicates in training data). A group is a connected component: each member is a near-duplicate of another one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cpo_pipe.data.progress import Meter, track
from cpo_pipe.pipeline.prepare.ngrams import MULTIPLIER, Hashes, word_ngrams, words, words_digest

if TYPE_CHECKING:
    from datasketch import MinHash

NGRAM = 2
"""Words of an n-gram. Longer ones count a changed word more often than a person would."""
FEWEST_NGRAMS = 15
"""Texts with fewer n-grams are near-duplicates only if their words are the same: a word decides what they ask."""
COMMON_SHARE, COMMON_COUNT = 0.01, 10
"""n-grams in more than this share of the texts, and in more than this number, are ignored: instructions that many
prompts share would make all of them near-duplicates."""
PERMUTATIONS = 128
"""Values of a signature; an estimate of the similarity has a standard deviation of at most 0.044."""
MARGIN = 0.18
"""Candidates whose estimate is lower than the threshold by more (4 standard deviations) are not compared."""
RECALL = 0.995
"""Smallest probability that two texts whose similarity is the threshold become candidates."""

_COUNTERS = 1 << 22
"""Counters of n-grams; two n-grams with the same counter are ignored too early, which needs as many texts."""


def near_duplicate_groups(name: str, texts: pa.ChunkedArray, threshold: float) -> NDArray[np.int64]:
    """Return the group of each text, named by the place of its first member: (N,).

    Memory: about 0.8 KB for each text; the texts are read one by one, and again where two of them are compared.

    Args:
        name: what the texts are, for the progress bar.
        texts: N strings.
        threshold: smallest Jaccard similarity of near-duplicates, of their sets of bigrams without common ones.
    """
    groups = np.arange(len(texts))
    with track(f"near-duplicates of {name}", 2 * len(texts), "texts") as meter:
        counts = _group_equal_words(texts, groups, meter)
        distinct = np.flatnonzero(groups == np.arange(len(texts)))
        meter.advance(len(texts) - len(distinct))
        limit = max(COMMON_COUNT, COMMON_SHARE * len(distinct))

        def ngrams(row: int) -> Hashes:
            found = word_ngrams(words(texts[row].as_py()), NGRAM)
            return found[counts[_counter(found)] <= limit]

        rows, signatures = _signatures(distinct, ngrams, meter)
    labels = _similar(signatures, lambda place: ngrams(rows[place]), threshold)
    groups[rows] = rows[labels]
    return groups[groups]  # texts with the same words follow the first of them


def with_keys(groups: NDArray[np.int64], keys: Sequence[str]) -> NDArray[np.int64]:
    """Return groups joined where they have an example with the same key, numbered from 0: (N,).

    Args:
        groups: the group of each example, named by the place of its first member: (N,).
        keys: of N examples; those with the same key must be together.
    """
    _, key_of = np.unique(np.array(keys), return_inverse=True)
    links = coo_array((np.ones(len(groups), np.int8), (key_of[groups], key_of)), shape=(len(groups), len(groups)))
    _, labels = connected_components(links, directed=False)
    return np.asarray(labels[key_of], np.int64)


def jaccard(one: Hashes, other: Hashes) -> float:
    """Return the number of common elements of two sets divided by the number of all."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _group_equal_words(texts: pa.ChunkedArray, groups: NDArray[np.int64], meter: Meter) -> NDArray[np.uint32]:
    """Give texts with the same words one group; return in how many distinct texts the n-grams of a counter are."""
    counts, first = np.zeros(_COUNTERS, np.uint32), dict[bytes, int]()
    row = 0
    for chunk in texts.chunks:
        for text in chunk.to_pylist():
            sequence = words(text)
            groups[row] = first.setdefault(words_digest(text, sequence), row)
            if groups[row] == row:
                np.add.at(counts, np.unique(_counter(word_ngrams(sequence, NGRAM))), 1)
            row += 1
            meter.advance()
    return counts


def _counter(ngrams: Hashes) -> NDArray[np.int64]:
    return (ngrams % _COUNTERS).astype(np.int64)


def _signatures(
    distinct: NDArray[np.int64], ngrams: Callable[[int], Hashes], meter: Meter
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Return the rows with enough n-grams, (R,), and their MinHash signatures, (R, PERMUTATIONS)."""
    rows, signatures = [], []
    for row in distinct:
        found = ngrams(row)
        if len(found) >= FEWEST_NGRAMS:
            sketch = _sketch()
            sketch.clear()
            sketch.update_batch((found >> np.uint64(32)).tolist())
            rows.append(row)
            signatures.append(sketch.digest())
        meter.advance()
    return np.array(rows, np.int64), np.array(signatures, np.uint32).reshape(-1, PERMUTATIONS)


@cache
def _sketch() -> "MinHash":
    """Return a sketch to use again and again; importing the library takes as long as comparing 1,000 texts."""
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, hashfunc=int)  # n-grams are hashes already


def _similar(signatures: NDArray[np.uint32], ngrams: Callable[[int], Hashes], threshold: float) -> NDArray[np.int64]:
    """Return the connected component of each text, named by its first member: (R,).

    Two texts are compared unless they are in one component already, so a component of m texts needs about m
    comparisons.
    """
    ngrams = lru_cache(1 << 12)(ngrams)
    labels, members = np.arange(len(signatures)), dict[int, list[int]]()
    for bucket in _buckets(signatures, threshold):
        for place, one in enumerate(bucket.tolist()):
            others = bucket[:place]
            others = others[labels[others] != labels[one]]
            estimates = (signatures[others] == signatures[one]).mean(axis=1)
            for other in others[estimates >= threshold - MARGIN].tolist():
                if labels[one] != labels[other] and jaccard(ngrams(one), ngrams(other)) >= threshold:
                    kept, merged = sorted((int(labels[one]), int(labels[other])))
                    members.setdefault(kept, [kept]).extend(moved := members.pop(merged, [merged]))
                    labels[moved] = kept
    return labels


def _buckets(signatures: NDArray[np.uint32], threshold: float) -> Iterator[NDArray[np.int64]]:
    """Yield the texts, two or more, whose signatures agree in a band of values.

    The bands are the widest ones with which two texts of the threshold agree in one with a probability of RECALL.
    """
    width = max(
        width for width in range(1, PERMUTATIONS + 1)
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL
    )  # fmt: skip
    for start in range(0, PERMUTATIONS - width + 1, width):
        keys = np.zeros(len(signatures), np.uint64)
        for column in signatures[:, start : start + width].T:
            keys = keys * MULTIPLIER + column
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]], append=~keys[order[-1:]]))
        for first, end in zip(edges[:-1][np.diff(edges) > 1], edges[1:][np.diff(edges) > 1], strict=True):
            yield order[first:end]
