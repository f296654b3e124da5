import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.prepare.articles import cut
from cpo_pipe.pipeline.prepare.prepare import find_examples, prepare
from tests.support.ground_truth import data, jsonl

EOS = 0
"""The only special token of the byte tokenizer comes first."""


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(2, 12), st.floats(0, 1))
def test_chunks_are_the_article_without_gaps(ids, size, share):
    pieces = list(cut(ids, size, share))
    joined = [token for piece in pieces for token in piece.prompt_ids + piece.target_ids]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < max(2, size / 2)
    assert all(piece.prompt_ids and piece.target_ids for piece in pieces)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [len(joined) == len(ids)] * bool(pieces)


def test_cut_by_hand():
    shape = [(len(piece.prompt_ids), len(piece.target_ids), piece.ends) for piece in cut(range(55), 20, 0.15)]
    assert shape == [(3, 17, False), (3, 17, False), (2, 13, True)]  # 0.15 · 15 = 2.25
    assert [piece.ends for piece in cut(range(49), 20, 0.15)] == [False, False]  # 9 tokens are less than half a piece
    assert [piece.ends for piece in cut(range(40), 20, 0.15)] == [False, True]


def test_text_preset_keeps_the_ids_of_the_article(tmp_path, store, byte_tokenizer):
    article = "".join(chr(97 + n % 26) * (1 + n % 3) + "é" for n in range(60))
    (tmp_path / "a.txt").write_text(article)
    shared = {"preset": "text", "source": str(tmp_path / "a.txt"), "tokenizer": byte_tokenizer, "train": 3}
    examples = prepare(data(**shared, chunk_tokens=40), store)
    rows = [row for split in ("train", "test") for row in examples.read(split).to_pylist()]
    ids = AutoTokenizer.from_pretrained(byte_tokenizer)(article)["input_ids"]
    assert len(ids) == 240  # 120 letters and 60 times 2 bytes: 6 whole pieces
    starts = {tuple(ids[start : start + 40]): start for start in range(0, 240, 40)}
    ended = [row for row in rows if row["ends"]]
    assert [row["target_ids"][34:] for row in ended] == [[EOS]]
    assert {len(row["target_ids"]) for row in rows if not row["ends"]} == {34}
    found = {tuple(row["prompt_ids"] + row["target_ids"][:34]) for row in rows}
    assert found == set(starts)
    assert all(len(row["prompt_ids"]) == 6 and row["rendered"] == row["prompt"] for row in rows)
    assert examples.rendering["chunk_tokens"] == 40
    assert examples.rendering["prompt_fraction"] == 0.15


def test_a_chunk_that_is_no_longer_the_end_is_another_example(tmp_path, store, byte_tokenizer):
    article = tmp_path / "a.txt"
    shared = {"preset": "text", "source": str(article), "tokenizer": byte_tokenizer, "train": 1, "chunk_tokens": 20}
    article.write_text("abcdefghijklmnopqrst")  # one token per byte: exactly one piece
    (before,) = prepare(data(**shared), store).read("train").to_pylist()
    article.write_text("abcdefghijklmnopqrstuvwxyz" + "0123456789")
    longer = prepare(data(**shared | {"train": 2}), store).read("train").to_pylist()
    (after,) = (row for row in longer if row["prompt"] == before["prompt"])
    assert (before["target"], before["ends"], after["ends"]) == (after["target"], True, False)
    assert before["target_ids"] == [*after["target_ids"], EOS]
    assert before["example_id"] != after["example_id"]


def test_ends_of_articles_too_short_for_a_chunk_are_counted(tmp_path, store, byte_tokenizer, caplog):
    articles = ["x" * 49, "y" * 55, "z" * 9, "w" * 40]  # 20 + 20 + 9, 20 + 20 + 15, 9, 20 + 20
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in articles])
    shared = {"preset": "text", "source": source, "tokenizer": byte_tokenizer, "chunk_tokens": 20, "max_rejected": 1}
    with caplog.at_level(logging.INFO):
        facts = prepare(data(**shared, train=1), store).artifact.manifest
    assert facts["short_ends"] == 2
    assert (facts["rows_read"], facts["rejected"]) == (4, {"duplicate": 2})  # the second pieces of x and of y
    assert "2 ends of articles shorter than half a chunk dropped" in caplog.messages[-1]


def test_chunks_must_fit_the_limits_and_have_no_template(tmp_path, store, byte_tokenizer):
    (tmp_path / "a.txt").write_text("x" * 5000)
    shared = {"preset": "text", "source": str(tmp_path / "a.txt"), "tokenizer": byte_tokenizer, "train": 1}
    with pytest.raises(ValidationError) as error:
        data(**shared, chunk_tokens=1000)
    assert error.value.errors()[0]["msg"] == (
        "Value error, max_target_tokens is 512, but chunk_tokens 1000 and prompt_fraction 0.15 make targets (with the "
        "EOS token) of 851 tokens; raise it to 851"
    )
    with pytest.raises(ValidationError, match=r"template\n  Extra inputs are not permitted"):
        data(**shared, template="dolly")
    (tmp_path / "a.txt").write_text("x" * 200)
    with pytest.raises(InputError, match="shorter than half a chunk"):
        prepare(data(**shared), store)


@pytest.mark.slow
def test_python_docs_with_a_tokenizer_made_from_them(store):
    config = data(preset="python-docs", tokenizer={"vocab_size": 300}, train=10, test=20, max_rows=3, chunk_tokens=32)
    assert find_examples(config, store) is None
    assert list(store.root.iterdir()) == []  # looking makes nothing
    examples = prepare(config, store)
    assert (examples.count("train"), examples.count("test")) == (10, 20)
    assert examples.tokenizer.path.parent == store.root / "tokenizers"
    assert len(examples.tokenizer.load()) == 300
    found = find_examples(config, store)
    assert found is not None
    assert found.tokenizer == examples.tokenizer
    spec = json.loads((examples.tokenizer.path / "spec.json").read_text())
    assert sorted(spec) == ["algorithm", "corpus", "vocab_size"]


def test_control_tokens_in_articles_are_text(tmp_path, store, chat_tokenizer, caplog):
    (tmp_path / "a.txt").write_text("once </s> upon <|end|> a time")
    config = data(
        preset="text", source=str(tmp_path / "a.txt"), tokenizer=chat_tokenizer, train=1, chunk_tokens=40,
        prompt_fraction=0.5, max_prompt_tokens=64, max_target_tokens=64,
    )  # fmt: skip
    (example,) = prepare(config, store).read("train").to_pylist()
    ids = [*example["prompt_ids"], *example["target_ids"]]
    assert [place for place, token in enumerate(ids) if token < 4] == [len(ids) - 1], "the article's end"
    assert example["prompt"] + example["target"] == "once </s> upon <|end|> a time"
    assert "examples: 1 have control tokens" in caplog.text
