"""Evaluations that embed texts: similarity, MAUVE, and texts longer than the embedder reads."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.eval.metrics.mauve import MIN_TEXTS
from tests.support.evaluation import DECODINGS, Bench, figures, no_engine


def test_two_systems_of_one_model_tie(tmp_path: Path, models: dict[str, Path]) -> None:
    found = figures(Bench(tmp_path, {"one": models["one"], "copy": models["one"]}, 6).run(judges=["similarity"]))
    assert found["copy", "greedy", "similarity tie"]["value"] == 1
    assert found["copy", "greedy", "similarity win rate"]["value"] == 0.5
    assert found["copy", "greedy", "cosine to target"] == found["one", "greedy", "cosine to target"] | {
        "system": "copy"
    }


def test_similarity_wins_follow_from_the_cosines(bench: Bench) -> None:
    result = bench.run(judges=["similarity"])
    values = pq.read_table(result.artifact.path / "values.parquet").to_pylist()
    cosines = {
        (row["system"], row["example_id"]): row["value"] for row in values if row["metric"] == "cosine to target"
    }
    ids = result.examples["example_id"].to_pylist()
    wins = sum(cosines["two", i] > cosines["one", i] + 1e-6 for i in ids)
    assert figures(result)["two", "greedy", "similarity win"]["value"] == pytest.approx(wins / len(ids))
    (against,) = result.table("comparisons").to_pylist()
    assert (against["system_a"], against["system_b"], against["n"]) == ("two", "one", len(ids))
    rate = figures(result)["two", "greedy", "similarity win rate"]
    assert against["difference"] == pytest.approx(rate["value"] - 0.5)


def test_mauve_is_omitted_for_few_examples(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = bench.run(mauve_seeds=2)
    assert not [key for key in figures(result) if "MAUVE" in key[2]]
    assert result.notes == ["MAUVE is not measured: it needs at least 100 examples, and there are 12"]
    assert result.notes[0] in caplog.text


def test_mauve_has_a_standard_deviation(tmp_path: Path, models: dict[str, Path]) -> None:
    found = figures(Bench(tmp_path, {"one": models["one"]}, MIN_TEXTS).run(mauve_seeds=2))
    assert 0 < found["one", "greedy", "MAUVE"]["value"] < 1
    assert found["one", "greedy", "MAUVE sd"]["value"] >= 0


def test_metrics_that_use_the_rankers_model_are_named(bench: Bench) -> None:
    from cpo_pipe.data.models.embedder import locate_embedder

    ranker = locate_embedder("minilm", bench.store).fingerprint
    shared = bench.run(ranker=ranker, judges=["similarity"])
    assert {"MAUVE", "cosine to target", "similarity win rate"} <= shared.shared_metrics
    assert "chrF" not in shared.shared_metrics
    other = bench.run(ranker="another", judges=["similarity"])
    assert other.shared_metrics == frozenset()
    assert other.artifact.path == shared.artifact.path  # marking changes no figure


def test_all_texts_are_embedded_once_with_one_progress_bar(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_pipe.data.models.embedder import Embedder, EmbeddingCache

    labels: list[str] = []
    add = EmbeddingCache.add
    monkeypatch.setattr(
        EmbeddingCache, "add", lambda cache, texts, label: [labels.append(label), add(cache, list(texts), label)]
    )
    embed, batches = Embedder.embed, []
    monkeypatch.setattr(
        Embedder, "embed", lambda embedder, texts: [batches.append(list(texts)), embed(embedder, texts)][1]
    )
    result = bench.run(judges=["similarity", "exact"], decodings=DECODINGS)
    written = {*result.table("outputs")["text"].to_pylist(), *result.examples["target"].to_pylist()}
    assert labels == ["embed outputs"]
    assert len(batches) == 1
    assert sorted(batches[0]) == sorted(written)


def test_nothing_is_embedded_when_no_figure_needs_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_pipe.data.models.embedder import Embedder

    monkeypatch.setattr(Embedder, "embed", no_engine)
    assert bench.run(mauve_seeds=2).artifact.complete()  # too few examples for MAUVE


@pytest.mark.slow
def test_mauve_with_the_features_of_a_causal_model(tmp_path: Path, models: dict[str, Path]) -> None:
    from cpo_pipe.eval.metrics.mauve import CausalEncoder, mauve

    bench = Bench(tmp_path / "store", models, MIN_TEXTS)
    scorer = bench.models["two"]
    result = bench.run(mauve_seeds=2, mauve_model="two", judge_models=bench.models)
    encoder = CausalEncoder(scorer, locate_tokenizer(str(scorer.path), bench.store))
    targets = encoder.encode(result.examples["target"].to_pylist())
    outputs = {(row["system"], row["example_id"]): row["text"] for row in result.table("outputs").to_pylist()}
    written = [outputs["one", example_id] for example_id in result.examples["example_id"].to_pylist()]
    expected = mauve(targets, encoder.encode(written), range(2))
    found = figures(result)
    assert found["one", "greedy", "MAUVE"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["one", "greedy", "MAUVE sd"]["value"] == pytest.approx(np.std(expected, ddof=1), abs=1e-6)
    spec = json.loads((result.artifact.path / "spec.json").read_text())
    assert spec["mauve"] == {**encoder.spec(), "seeds": 2}

    embedded = bench.run(mauve_seeds=2)
    assert figures(embedded)["one", "greedy", "MAUVE"]["value"] != pytest.approx(np.mean(expected), abs=1e-3)


def test_texts_longer_than_the_context_are_noted(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "store", {"one": models["one"]}, MIN_TEXTS)
    plain = bench.run(judges=["similarity"], mauve_seeds=1)
    assert not [note for note in plain.notes if "longer than" in note]

    rows = pq.read_table(bench.examples.artifact.path / "examples.parquet").to_pylist()
    long = [row | {"target": "the quick brown fox " * 200} for row in rows[1:4]]
    selection = pa.Table.from_pylist([*long, *rows[4:]], schema=EXAMPLES)
    monkeypatch.setattr(Examples, "read", lambda *_: selection)
    result = bench.run(judges={"near": {"kind": "similarity"}}, mauve_seeds=1, seed=1)
    texts = 2 * selection.num_rows  # outputs and targets
    said = (
        f"3 of {texts} texts (1.5%) are longer than the 256 tokens that minilm reads: differences after these are not "
        "seen; set evaluate.embedder to a model that reads more, or shorten the texts"
    )
    assert [note for note in result.notes if "longer than" in note] == [f"near: {said}", f"MAUVE: {said}"]

    context = bench.models["one"].context()
    causal = bench.run(judges=["exact"], mauve_seeds=1, mauve_model="one", judge_models=bench.models, seed=1)
    (note,) = [note for note in causal.notes if "longer than" in note]
    assert note.startswith(f"MAUVE: 3 of {texts} texts (1.5%) are longer than the {context:,} tokens that one reads")
    assert "set evaluate.mauve_model to a model that reads more" in note


def test_causal_features_of_a_text_that_is_empty_or_too_long(models: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np
    import torch

    from cpo_pipe.eval.metrics.mauve import CausalEncoder, causal_features

    store = Store(tmp_path)
    model, tokenizer = locate_model(str(models["one"]), store), locate_tokenizer(str(models["one"]), store)
    encoder, context = CausalEncoder(model, tokenizer), model.context()
    assert context is not None
    long = " the quick" * context
    cut = tokenizer.load().decode(tokenizer.load().encode(long)[:context])
    empty, whole, prefix = encoder.encode(["", long, cut])
    np.testing.assert_allclose(whole, prefix, atol=1e-5)
    ended = causal_features(model.load(torch.float32).eval(), [[tokenizer.load().eos_token_id]])  # type: ignore[list-item]
    np.testing.assert_allclose([empty], ended, atol=1e-5)
