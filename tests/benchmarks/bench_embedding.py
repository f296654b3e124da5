"""Embedding negatives as `rank` does, against the sentence model's own `encode`, on texts with duplicates."""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from cpo_pipe.data.embedding import locate_embedder
from cpo_pipe.data.store import Store

PAIRS = 5


def texts(share_of_duplicates: float, count: int = 240) -> list[str]:
    """Texts of very different lengths, as samples that end at different places are."""
    words = ["model", "writes", "what", "it", "has", "read", "and", "stops", "where", "text", "ends"]
    rng = np.random.default_rng(0)
    distinct = [
        " ".join(rng.choice(words, size=rng.integers(3, 90))) for _ in range(round(count * (1 - share_of_duplicates)))
    ]
    return [distinct[i % len(distinct)] for i in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.3])
def bench_encode(share: float, tmp_path: Path) -> None:
    ours = locate_embedder("minilm", Store(tmp_path))
    theirs = SentenceTransformer(str(ours.path))
    content = texts(share)
    ours.encode(content[:4])
    ratios = []
    for _ in range(PAIRS):
        start = time.process_time()
        left = ours.encode(content)
        middle = time.process_time()
        right = theirs.encode(content, normalize_embeddings=True)
        ratios.append((time.process_time() - middle) / (middle - start))
    assert np.abs((left * right).sum(-1) - 1).max() < 1e-5
    print(f"\nduplicates {share:.0%}: {statistics.median(ratios):.2f}× the rate of SentenceTransformer.encode "
          f"(CPU time, {min(ratios):.2f}–{max(ratios):.2f} over {PAIRS} pairs)")  # fmt: skip
