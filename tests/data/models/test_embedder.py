import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models import embedder as embedding
from cpo_pipe.data.models.embedder import EQUAL, EmbeddingCache, locate_embedder, tied, truncation
from cpo_pipe.data.progress import Meter
from cpo_pipe.data.store import Store
from tests.support.damage import rot

TEXTS = ["a longer sentence about the weather in spring", "cat", "", "cat", "word " * 700, "a cat sat on the mat"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_vectors_are_those_of_the_plain_library(store: Store) -> None:
    from sentence_transformers import SentenceTransformer

    embedder = locate_embedder("minilm", store)
    plain = SentenceTransformer(str(embedder.path)).encode(TEXTS, normalize_embeddings=True)

    vectors = embedder.encode(TEXTS)

    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, plain, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[1], vectors[3])  # equal texts, equal bits


def test_damaged_weights_embed_nothing(store: Store, tmp_path: Path) -> None:
    folder = shutil.copytree(locate_embedder("minilm", store).path, tmp_path / "embedder")
    rot(folder / "model.safetensors", tmp_path / "store")
    embedder = locate_embedder(str(folder), Store(tmp_path / "store"))
    assert embedder.fingerprint == locate_embedder("minilm", store).fingerprint
    with pytest.raises(RunError, match=r"embedder/model\.safetensors: damaged"):
        pickle.loads(pickle.dumps(embedder)).encode(["cat"])
    assert locate_embedder(str(folder), Store(tmp_path / "store")).fingerprint != embedder.fingerprint


def test_texts_longer_than_the_window_are_flagged(store: Store) -> None:
    embedder = locate_embedder("minilm", store)
    assert embedder.window() == 256
    words = ["fox " * 254, "fox " * 255, "fox " * 254 + "cow", "fox " * 254 + "dog", "cat", "fox " * 255]
    vectors, truncated = embedder.embed(words)  # a token at each end leaves room for 254 words
    assert truncated.tolist() == [False, True, True, True, False, True]
    np.testing.assert_allclose(vectors[2], vectors[3], atol=1e-6)  # what differs is not seen
    cache = EmbeddingCache(embedder)
    cache.encode(words)
    assert (cache.truncated(words), cache.truncated(["cat", words[0]]), cache.window()) == (4, 0, 256)


def test_a_copy_with_a_larger_window_is_another_model_that_reads_more(store: Store, tmp_path: Path) -> None:
    packaged = locate_embedder("minilm", store)
    shutil.copytree(packaged.path, tmp_path / "wide")
    (tmp_path / "wide" / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')
    wide = locate_embedder(str(tmp_path / "wide"), store)
    vectors, truncated = wide.embed(["fox " * 254 + "cow", "fox " * 254 + "dog", "fox " * 511])
    assert (wide.window(), truncated.tolist()) == (512, [False, False, True])
    assert vectors[0] @ vectors[1] < 0.9999
    assert wide.fingerprint != packaged.fingerprint


def test_tied_cosines_are_those_of_one_group_that_are_equal() -> None:
    random = np.random.default_rng(0)
    cosines, groups = random.integers(0, 4, 60) / 4 + random.normal(0, 1e-8, 60), random.integers(0, 12, 60)
    cosines[:5] = np.nan
    expected = [
        any(abs(cosines[i] - cosines[j]) <= EQUAL and groups[i] == groups[j] for j in range(60) if j != i)
        for i in range(60)
    ]
    assert 10 < sum(expected) < 50
    assert tied(cosines, groups).tolist() == expected
    assert tied(np.zeros(0), np.zeros(0)).tolist() == []


def test_what_is_told_about_truncated_texts() -> None:
    assert truncation(3, 2000, "minilm", 256, "do this") == (
        "3 of 2,000 texts (0.1%) are longer than the 256 tokens that minilm reads: differences after these are not "
        "seen; do this, or shorten the texts"
    )
    assert "are longer than minilm reads:" in truncation(3, 2000, "minilm", None, "do this")


def test_no_texts_give_no_vectors(store: Store) -> None:
    assert locate_embedder("minilm", store).encode([]).shape == (0, 384)


def test_a_cache_embeds_a_text_once(store: Store) -> None:
    embedder = locate_embedder("minilm", store)
    cache = EmbeddingCache(embedder)
    first = cache.encode(TEXTS)
    again = cache.encode(["cat", "dog", ""])
    np.testing.assert_array_equal(again[0], first[1])
    np.testing.assert_array_equal(again[2], first[2])
    np.testing.assert_allclose(again[1], embedder.encode(["dog"])[0], atol=1e-6)


def test_only_add_shows_a_bar_and_none_for_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[str, int]] = []

    @contextmanager
    def recorded(label: str, total: int, unit: str) -> Iterator[Meter]:
        bars.append((label, total))
        yield Meter(label, total, unit)

    monkeypatch.setattr(embedding, "track", recorded)
    embedder = locate_embedder("minilm", store)
    cache = EmbeddingCache(embedder)
    cache.encode(["cat"])
    cache.add(["cat", "dog", "dog", "cow"], "embed outputs")
    cache.add(["cow", "cat"], "embed outputs")
    assert bars == [("embed outputs", 2)]
    np.testing.assert_allclose(cache.encode(["dog", "cow"]), embedder.encode(["dog", "cow"]), atol=1e-6)
    assert len(bars) == 1


def test_a_model_is_known_by_its_content(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    before = locate_embedder(str(folder), store)
    assert before.name == str(folder)

    (folder / "README.md").write_text("a card")
    assert locate_embedder(str(folder), store).fingerprint == before.fingerprint

    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert locate_embedder(str(folder), store).fingerprint != before.fingerprint


def test_a_model_without_safetensors_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"embedding model .*: no \*\.safetensors there"):
        locate_embedder(str(tmp_path), store)


def test_a_missing_model_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="embedding model no/such/folder: no such folder"):
        locate_embedder("no/such/folder", store)


def test_locating_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cpo_pipe.data.models.embedder import locate_embedder
from cpo_pipe.data.store import Store
locate_embedder("minilm", Store(Path({str(tmp_path)!r})))
print([name for name in ("torch", "transformers", "sentence_transformers") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ── averages of chunks ───────────────────────────────────────────────────────────────────────────────────────────


def test_long_texts_have_the_mean_of_their_chunks(store: Store) -> None:
    """By hand: `word` is one token, and the packaged model reads 256, with [CLS] and [SEP]."""
    embedder = locate_embedder("minilm", store)
    long = " ".join(f"{word}" for word in ["cat"] * 254 + ["dog"] * 254 + ["tree"] * 10)
    found = embedder.embed_averaged(["a cat", long, "cat " * 254, long.upper()])
    parts = embedder.encode(["cat " * 254, "dog " * 254, "tree " * 10])
    mean = parts.mean(axis=0)
    np.testing.assert_allclose(found.vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(found.vectors[3], found.vectors[1], atol=1e-5)
    np.testing.assert_array_equal(found.vectors[[0, 2]], embedder.encode(["a cat", "cat " * 254]))
    assert found.truncated.tolist() == [False] * 4
    assert embedder.embed([long]).truncated.tolist() == [True]
    assert embedder.embed_averaged([]).vectors.shape[0] == 0


def test_chunks_end_between_words_and_lose_nothing(store: Store) -> None:
    embedder = locate_embedder("minilm", store)
    words = [f"unbelievable{number}" for number in range(300)]  # several tokens each
    (chunks,) = embedder._chunks([" ".join(words)])
    assert [word for chunk in chunks for word in chunk.split()] == words
    assert not embedder.embed(chunks).truncated.any()
    assert len(chunks) > 1
    (cut,) = embedder._chunks(["x" * 3000])  # one word
    assert "".join(cut) == "x" * 3000


def test_an_average_tells_texts_apart_that_differ_after_the_window(store: Store) -> None:
    embedder = locate_embedder("minilm", store)
    texts = ["the apples are counted " * 100 + end for end in ("so it is five " * 60, "whales live in the sea " * 60)]
    one, other = embedder.encode(texts)
    assert one @ other == pytest.approx(1, abs=1e-5)
    one, other = embedder.embed_averaged(texts).vectors
    assert one @ other < 0.95
