"""Texts of random words, and changed copies of them."""

import random

WORDS = [a + b + c for a in ("ba", "de", "fi", "go", "lu", "mi") for b in "klmnprst" for c in ("a", "en", "is", "ox")]


def text(seed: int, length: int = 40) -> str:
    """Random words; two texts have hardly a pair of words in common."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def changed(original: str, *places: int) -> str:
    """The text with other words at these places."""
    words = original.split()
    for place in places:
        words[place] = f"other{place}"
    return " ".join(words)


def excerpt(original: str, seed: int, start: int, count: int) -> str:
    """Random words around `count` words of a text."""
    before, after = text(seed).split()[:20], text(seed + 5000).split()[:20]
    return " ".join([*before, "x", *original.split()[start : start + count], "y", *after])
