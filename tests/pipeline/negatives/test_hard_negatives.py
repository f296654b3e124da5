"""Batch negatives that are the nearest to the target by embedding."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import hash_keys
from cpo_pipe.data.models.embedder import locate_embedder
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.negatives.batch import Draw, batch_spec, load_draws
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.strategy import ExampleWork
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.samples import SampleRequest, make_missing
from tests.support.pairs import write_jsonl

WORDS = ["a red fox", "the Danube", "two apples", "winter", "an old clock", "bread", "a loud drum", "blue paint"]
ROWS = [{"prompt": f"ask {n}", "target": f"{WORDS[n % 8]} and {WORDS[n * 3 % 7]} {n % 5}"} for n in range(40)]
EQUAL_PROMPTS = [{"prompt": "ask 0", "target": f"{ROWS[0]['target']}, or so {n}"} for n in range(3)]
EQUAL_TARGETS = [{"prompt": f"ask again {n}", "target": ROWS[1]["target"]} for n in range(3)]
ONLY_IN_CASE = [
    {"prompt": f"say {n}{case}", "target": getattr(f"{WORDS[n % 8]} {'or so ' * n}", case)()}
    for n in range(12)
    for case in ("lower", "upper", "title")
]
"""The packaged model knows no capital letters: to it three at a time are equal."""


class Bench:
    """A store with examples, and the negatives borrowed among them."""

    def __init__(self, root: Path, tokenizer: Path, rows: list[dict[str, str]]):
        root.mkdir(exist_ok=True)
        self.store = Store(root / "store")
        source = str(write_jsonl(root / "rows.jsonl", rows))
        data = Pairs(source=source, tokenizer=str(tokenizer), train=len(rows), max_target_tokens=4000)
        examples = prepare(data, self.store)
        self.selection, self.rendering = examples.read("train"), examples.rendering
        self.embedder = locate_embedder("minilm", self.store)

    def borrowed(
        self, count: int, hard_negatives_from: int, seed: int = 0, batch_size: int = 64, skip: int = 0
    ) -> dict[str, list[str]]:
        """Texts of the negatives by example id; those of the first `skip` examples are made last."""
        ids = self.selection["example_id"].to_pylist()
        embedder = self.embedder if hard_negatives_from else None
        rows = self.store.rows(
            "negatives", batch_spec(self.rendering, seed, hash_keys(sorted(ids)), hard_negatives_from, embedder)
        )
        key = "negatives.sources.batch"
        work = ExampleWork(rows, partial(load_draws, self.selection, seed, hard_negatives_from, embedder, key))
        for first in sorted({skip, 0}, reverse=True):
            examples, wanted = self.selection.slice(first), SampleRequest(rows, count)
            make_missing(wanted, examples, work, LocalExecutor(), batch_size=batch_size, label="batch")
        found: dict[str, list[str]] = {example_id: [] for example_id in ids}
        for row in rows.read(ids).to_pylist():
            found[row["example_id"]].append(row["text"])
        return found

    def examples(self) -> list[dict[str, Any]]:
        return self.selection.to_pylist()


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model, [*ROWS, *EQUAL_PROMPTS, *EQUAL_TARGETS])


def test_targets_that_the_embedding_model_does_not_read_to_the_end_are_counted(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS[:10], *({"prompt": f"long {n}", "target": "a red fox and " * 300 + str(n)} for n in range(2))]
    Bench(tmp_path, tiny_model, rows).borrowed(2, hard_negatives_from=4)
    targets = len({row["target"] for row in rows})
    assert f"hard_negatives_from: 2 of {targets} texts" in caplog.text
    assert "longer than the 256 tokens that minilm reads" in caplog.text
    assert "set negatives.sources.batch.embedder to a model that reads more" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("hard_negatives_from", [6, 20])
def test_they_are_the_nearest_of_those_drawn(bench: Bench, hard_negatives_from: int) -> None:
    found = bench.borrowed(4, hard_negatives_from)
    model = SentenceTransformer(str(bench.embedder.path), device="cpu")
    columns = (bench.selection[name].to_pylist() for name in ("example_id", "rendered", "target"))
    ids, prompts, targets = columns
    draw = Draw(ids, prompts, targets, seed=0)
    for row, example_id in enumerate(ids):
        drawn = [targets[other] for other in draw.others(row, hard_negatives_from)]
        cosines = model.encode(drawn, normalize_embeddings=True) @ model.encode(targets[row], normalize_embeddings=True)
        chosen = [cosines[drawn.index(text)] for text in found[example_id]]
        np.testing.assert_allclose(chosen, sorted(cosines, reverse=True)[:4], atol=1e-5)


def test_of_all_others_the_nearest(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model, ROWS)
    distinct = len({row["target"] for row in ROWS})
    found = bench.borrowed(2, distinct - 1)
    model = SentenceTransformer(str(bench.embedder.path), device="cpu")
    examples = bench.examples()
    vectors = model.encode([example["target"] for example in examples], normalize_embeddings=True)
    for example, vector in zip(examples, vectors, strict=True):
        best = {e["target"]: float(v @ vector) for e, v in zip(examples, vectors, strict=True)}
        del best[example["target"]]
        chosen = [best[text] for text in found[example["example_id"]]]
        np.testing.assert_allclose(chosen, sorted(best.values(), reverse=True)[:2], atol=1e-5)


def test_never_the_own_target_nor_that_of_an_equal_prompt(bench: Bench) -> None:
    found = bench.borrowed(8, 30)
    own: dict[str, set[str]] = {}
    for example in bench.examples():
        own.setdefault(example["rendered"], set()).add(example["target"])
    for example in bench.examples():
        texts = found[example["example_id"]]
        assert len(set(texts)) == 8
        assert not own[example["rendered"]] & set(texts), "though none is nearer"
        assert example["target"] not in texts


def test_they_depend_on_seed_and_pool_alone(bench: Bench, tmp_path: Path, tiny_model: Path) -> None:
    found = bench.borrowed(3, 12)
    other = Bench(tmp_path / "other", tiny_model, [*EQUAL_TARGETS, *EQUAL_PROMPTS, *ROWS[::-1]])
    assert other.borrowed(3, 12, batch_size=5) == found, "neither order nor batching"
    assert bench.borrowed(3, 12, seed=1) != found
    assert bench.borrowed(3, 13) != found


def test_more_of_them_only_add(bench: Bench) -> None:
    first = bench.borrowed(1, 30)
    grown = bench.borrowed(5, 30)
    assert {example_id: texts[:1] for example_id, texts in grown.items()} == first
    assert all(len(set(texts)) == 5 for texts in grown.values()), "none stands twice"


@pytest.mark.slow
def test_what_is_equal_to_the_model_comes_in_one_order(tmp_path: Path, tiny_model: Path) -> None:
    rows = [*ROWS[:8], *ONLY_IN_CASE]
    found = Bench(tmp_path / "at once", tiny_model, rows).borrowed(5, 30)
    for skip in (7, 23):
        restarted = Bench(tmp_path / str(skip), tiny_model, rows)
        assert restarted.borrowed(5, 30, skip=skip) == found


def test_they_are_others_than_without(bench: Bench) -> None:
    plain = batch_spec({}, 0, "pool")
    assert "hard_negatives_from" not in plain
    assert len({str(spec) for spec in (plain, *(batch_spec({}, 0, "pool", n, bench.embedder) for n in (8, 9)))}) == 3
    assert bench.borrowed(3, 0) != bench.borrowed(3, 12)


def test_too_few_to_choose_from_are_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="there are only"):
        bench.borrowed(1, 50)
    with pytest.raises(ValueError, match="hard_negatives_from is 2, fewer than count, which is 3; raise it"):
        Negatives.model_validate({"sources": {"batch": {"count": 3, "hard_negatives_from": 2}}})
