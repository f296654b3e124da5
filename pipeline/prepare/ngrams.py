"""Words of a text and its word n-grams as hashes, by which texts are compared."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no space between words: a character counts as a word."""
_PUNCTUATION = r"""\s.,;:!?'"`()\[\]{}…“”‘’„«»¿¡–—、。，「」"""
_WORD = re.compile(rf"[^\W{_UNSPACED}]+(?:(?<=\d)[.,]\d+)*|[{_UNSPACED}]|[^\w{_PUNCTUATION}]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Of polynomial hashes modulo 2^64: odd, its bits are those of the golden ratio."""


def words(text: str) -> list[str]:
    """Return a text's words, numbers and symbols, without case, white space, quotes and punctuation.

    Symbols (`+`, `-`, `$`, `%`) are kept: they tell `3 + 5` from `3 - 5`.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_ngrams(sequence: Sequence[str], n: int) -> Hashes:
    """Return the 64-bit hashes of the distinct runs of `n` words, sorted."""
    hashes = np.fromiter(map(_hash, sequence), np.uint64, len(sequence))
    size = max(len(hashes) - n + 1, 0)
    mixed = np.zeros(size, np.uint64)
    for place in range(n):  # a polynomial in an odd number, modulo 2^64
        mixed = mixed * MULTIPLIER + hashes[place : place + size]
    return np.unique(mixed ^ (mixed >> np.uint64(29)))


def words_digest(text: str, sequence: Sequence[str]) -> bytes:
    """Return a digest that two texts share if their words are the same; of texts without words, the texts."""
    return blake2b("\n".join(sequence or [text]).encode(errors="surrogatepass"), digest_size=16).digest()


@lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
