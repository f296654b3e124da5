import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import digest, example_id, tokenizer_fingerprint
from cpo_pipe.data.recipe import Data
from cpo_pipe.data.schemas import EXAMPLES, REJECTED
from cpo_pipe.data.store import Store
from cpo_pipe.data.tokenizers import train_bpe
from cpo_pipe.pipeline.prepare import cut, find_examples, prepare, split_ends, with_preset

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, which is not part of the project")
EOS = 0
"""The only special token of the byte tokenizer below comes first."""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([], 257, folder)
    return str(folder)


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n, start=0):
    return [{"prompt": f"question {i}", "target": f"answer {i}"} for i in range(start, start + n)]


def by_split(examples, column="prompt"):
    return {name: examples.read(name)[column].to_pylist() for name in ("train", "validation", "test")}


# ── control tokens and ends ──────────────────────────────────────────────────────────────────────────────────────

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """One token per byte from 4 on; BOS before every text, EOS after it; `<think>` is a token and not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.add_tokens(["<think>"])
    wrapped.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("chat")
    wrapped.save_pretrained(folder)
    return str(folder)


def one(tmp_path, store, tokenizer, row, **config):
    source = jsonl(tmp_path / "one.jsonl", [row])
    (example,) = prepare(Data(source=source, tokenizer=tokenizer, train=1, **config), store).read("train").to_pylist()
    return example


@pytest.mark.parametrize("template", ["chat", "<s><|start|>{prompt}<|end|><|start|>"])
def test_a_prompt_has_one_bos_and_a_target_one_eos(tmp_path, store, chat_tokenizer, template):
    example = one(tmp_path, store, chat_tokenizer, {"prompt": "hi", "target": "yo</s>\n</s>"}, template=template)
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    h, i, y, o = tokenizer.convert_tokens_to_ids(list("hiyo"))
    assert example["prompt_ids"] == [0, 2, h, i, 3, 2]
    assert (example["target"], example["target_ids"]) == ("yo", [y, o, 1])


@pytest.mark.parametrize("template", ["chat", "<s><|start|>{prompt}<|end|><|start|>", "plain"])
def test_control_tokens_in_the_data_are_text(tmp_path, store, chat_tokenizer, caplog, template):
    row = {"prompt": "<s>what is <|end|>?", "context": "</s> and <|start|>", "target": "<s>it </s> ends<|end|>"}
    example = one(tmp_path, store, chat_tokenizer, row, template=template, columns={"context": "context"})
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    meant = {"plain": [0]}.get(template, [0, 2, 3, 2])
    assert [token for token in example["prompt_ids"] if token < 4] == meant, "those of the template alone"
    assert "< s>what is < |end|>?\n\n< /s> and < |start|>" in example["rendered"]
    assert example["prompt"] == "<s>what is <|end|>?\n\n</s> and <|start|>", "as the source has it"
    assert [place for place, token in enumerate(example["target_ids"]) if token < 4] == [len("<s>it </s> ends<|end|>")]
    assert tokenizer.decode(example["target_ids"][:-1]) == example["target"] == row["target"], "to the letter"
    assert "examples: 1 have control tokens in their texts; they are encoded as plain text" in caplog.text


def test_texts_without_control_tokens_have_the_ids_they_had(tmp_path, store, chat_tokenizer, caplog):
    row = {"prompt": "a <b> s|end| é\U0001f98a", "target": "<think>so</think> x < y"}
    example = one(tmp_path, store, chat_tokenizer, row, template="chat")
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    messages = [{"role": "user", "content": row["prompt"]}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert example["prompt_ids"] == theirs
    assert example["target_ids"] == [*tokenizer.encode(row["target"], add_special_tokens=False), 1]
    assert example["target_ids"][0] == tokenizer.convert_tokens_to_ids("<think>"), "a part of the answer"
    assert "control tokens" not in caplog.text


def test_what_was_taken_otherwise_is_said_each_time(tmp_path, store, chat_tokenizer, caplog):
    rows = [{"prompt": "a</s>", "target": "b"}, {"prompt": "c", "target": "d</s>"}, {"prompt": "e", "target": "f"},
            {"prompt": "g", "target": "</s>"}]  # fmt: skip
    config = Data(source=jsonl(tmp_path / "a.jsonl", rows), tokenizer=chat_tokenizer, train=3, max_rejected=0.5)
    for _ in range(2):
        caplog.clear()
        facts = prepare(config, store).product.manifest
        assert (facts["control_tokens"], facts["written_ends"]) == (1, 1)
        assert facts["rejected"] == {"empty target": 1}
        assert "examples: 1 have control tokens in their texts" in caplog.text
        assert "examples: 1 targets end in a written EOS token; it is encoded as the end of the target" in caplog.text


def test_control_tokens_in_articles_are_text(tmp_path, store, chat_tokenizer, caplog):
    (tmp_path / "a.txt").write_text("once </s> upon <|end|> a time")
    config = Data(
        preset="text", source=str(tmp_path / "a.txt"), tokenizer=chat_tokenizer, train=1, piece_tokens=40,
        prompt_share=0.5, max_prompt_tokens=64, max_target_tokens=64,
    )  # fmt: skip
    (example,) = prepare(config, store).read("train").to_pylist()
    ids = [*example["prompt_ids"], *example["target_ids"]]
    assert [place for place, token in enumerate(ids) if token < 4] == [len(ids) - 1], "the article's end"
    assert example["prompt"] + example["target"] == "once </s> upon <|end|> a time"
    assert "examples: 1 have control tokens" in caplog.text


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pair_as_stored(tmp_path, store, byte_tokenizer):
    row = {"q": "hi", "c": "ctx", "a": "yo", "k": "kind"}
    source = jsonl(tmp_path / "a.jsonl", [row, {"q": "hi", "a": "no"}])
    columns = {"prompt": "q", "target": "a", "context": "c", "category": "k"}
    config = Data(source=source, columns=columns, tokenizer=byte_tokenizer, template="<{prompt}|{context}>", train=2)
    examples = prepare(config, store)
    assert pq.read_schema(examples.product.path / "examples.parquet").equals(EXAMPLES)
    first, second = sorted(examples.read("train").to_pylist(), key=lambda example: -len(example["prompt"]))
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    assert first == {
        "example_id": example_id("hi", "yo", context="ctx"), "split": "train", "prompt": "hi\n\nctx",
        "rendered": "<hi|ctx>", "target": "yo", "prompt_ids": tokenizer.convert_tokens_to_ids(list("<hi|ctx>")),
        "target_ids": [*tokenizer.convert_tokens_to_ids(["y", "o"]), EOS], "ends": True, "category": "kind",
    }  # fmt: skip
    assert (second["rendered"], second["category"]) == ("<hi|>", None)
    assert examples.tokenizer.path == Path(byte_tokenizer)
    assert examples.rendering == {
        "template": config.template, "tokenizer": examples.tokenizer.fingerprint, "special_tokens": "as text",
    }  # fmt: skip
    assert tokenizer_fingerprint(examples.product.path / "tokenizer", store.hash_file) == examples.tokenizer.fingerprint


def test_refused_rows_carry_their_reason_and_are_counted(tmp_path, store, byte_tokenizer, caplog):
    lines = [json.dumps(row) for row in pairs(8)]
    lines += [
        '{"prompt": "  ", "target": "a"}', '{"prompt": "p", "target": ""}',
        '{"prompt": "p"}', '{"prompt": "p", "target": null}',
        '{"prompt": "p", "target": 7}', '{"prompt": "p", "target": "\\ud800"}', "nonsense",
        json.dumps({"prompt": "x" * 21, "target": "a"}), json.dumps({"prompt": "p", "target": "y" * 20}),
        json.dumps({"prompt": "x" * 20, "target": "y" * 19}), lines[0],
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    limits = {"max_prompt_tokens": 20, "max_target_tokens": 20, "max_rejected": 0.6}
    config = Data(source=str(tmp_path / "a.jsonl"), tokenizer=byte_tokenizer, train=5, **limits)
    with caplog.at_level(logging.INFO):
        examples = prepare(config, store)
    rejected = pq.read_table(examples.product.path / "rejected.parquet")
    assert rejected.schema.equals(REJECTED)
    rows = sorted(rejected.to_pylist(), key=lambda row: int(row["source"].split(":")[1]))
    assert [(row["source"], row["reason"], row["detail"]) for row in rows] == [
        ("a.jsonl:9", "empty prompt", "column prompt (data.columns.prompt) is '  '"),
        ("a.jsonl:10", "empty target", "column target (data.columns.target) is ''"),
        ("a.jsonl:11", "missing field", "column target (data.columns.target)"),
        ("a.jsonl:12", "missing field", "column target (data.columns.target)"),
        ("a.jsonl:13", "not text", "column target (data.columns.target) has type int: 7"),
        ("a.jsonl:14", "not UTF-8", "column target (data.columns.target) is \\ud800"),
        ("a.jsonl:15", "not JSON", "nonsense\n"),
        ("a.jsonl:16", "prompt too long", "21 tokens, more than data.max_prompt_tokens 20"),
        # 20 bytes and the EOS token
        ("a.jsonl:17", "target too long", "21 tokens, more than data.max_target_tokens 20"),
        ("a.jsonl:19", "duplicate", "question 0"),
    ]
    assert rows[-1]["example_id"] == example_id("question 0", "answer 0")
    summary = (
        "examples: 5 train, 0 validation, 4 test; 10 rejected (2 missing field, 1 empty prompt, 1 empty target, "
        "1 not text, 1 not UTF-8, 1 not JSON, 1 prompt too long, 1 target too long, 1 duplicate)"
    )
    facts = examples.product.manifest
    assert (facts["rows_read"], facts["examples"]) == (19, {"train": 5, "validation": 0, "test": 4})
    assert sorted(caplog.messages[-1]) == sorted(summary)
    assert caplog.messages[-1].startswith("examples: 5 train, 0 validation, 4 test; 10 rejected (2 missing field, 1 ")


def test_too_many_refused_rows_are_an_error_and_leave_nothing(tmp_path, store, byte_tokenizer):
    rows = [*pairs(8), {"prompt": "", "target": "a"}, {"prompt": "p", "target": ""}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        prepare(Data(source=source, tokenizer=byte_tokenizer, train=5, max_rejected=0.19), store)
    assert str(error.value) == (
        f"data.source {source}: 2 of 10 rows were rejected (1 empty prompt, 1 empty target), more than "
        "data.max_rejected 0.19 allows; see a.jsonl:9 (empty prompt: column prompt (data.columns.prompt) is ''), "
        "a.jsonl:10 (empty target: column target (data.columns.target) is ''); correct them or raise the limit"
    )
    assert [path.name for path in (store.root / "examples").iterdir()] == [".locks"]
    assert prepare(Data(source=source, tokenizer=byte_tokenizer, train=5, max_rejected=0.2), store).count("test") == 3


def test_context_column_named_by_the_user_must_be_there_but_a_presets_need_not(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [{"instruction": f"i{n}", "response": "r"} for n in range(3)])
    shared = {"preset": "dolly", "source": source, "tokenizer": byte_tokenizer, "train": 2}
    assert prepare(Data(**shared), store).read("train")["rendered"][0].as_py().startswith("Below is an instruction")
    with pytest.raises(InputError, match=r"no column 'ctx' \(data\.columns\.context\); the columns there are"):
        prepare(Data(**shared, columns={"context": "ctx"}), store)


def test_errors_of_the_source_pass_through_the_training_of_a_tokenizer(tmp_path, store):
    shared = {
        "source": jsonl(tmp_path / "a.jsonl", [{"q": "1", "a": "x"}]),
        "tokenizer": {"vocab_size": 300},
        "train": 1,
    }
    with pytest.raises(InputError, match="no column 'prompt'"):
        prepare(Data(**shared), store)
    with pytest.raises(InputError, match=r"data\.template is chat"):
        prepare(Data(**shared, columns={"prompt": "q", "target": "a"}, template="chat"), store)
    assert not list(store.root.glob("tokenizers/[!.]*"))


def test_max_rows_reads_the_first(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", pairs(9))
    examples = prepare(Data(source=source, tokenizer=byte_tokenizer, train=1, max_rows=4), store)
    assert sorted(examples.read("train")["prompt"].to_pylist() + examples.read("test")["prompt"].to_pylist()) == [
        f"question {n}" for n in range(4)
    ]


def test_a_context_is_no_part_of_the_prompt(tmp_path, store, byte_tokenizer):
    """The template puts a context elsewhere: other token ids, hence another id; but the same side of the split."""
    rows = [{"prompt": "A", "context": "B", "target": "t"}, {"prompt": "A\n\nB", "context": "", "target": "t"}]
    columns = {"context": "context"}
    source = jsonl(tmp_path / "a.jsonl", rows)
    examples = prepare(Data(source=source, columns=columns, tokenizer=byte_tokenizer, template="dolly", train=1), store)
    one, other = examples.read("train").to_pylist()
    assert one["prompt"] == other["prompt"] == "A\n\nB"
    assert one["rendered"] != other["rendered"]
    assert {one["example_id"], other["example_id"]} == {example_id("A", "t", context="B"), example_id("A\n\nB", "t")}


# ── presets ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_presets_fill_only_what_the_user_left_out():
    dolly = with_preset(Data(preset="dolly", tokenizer="t", columns={"category": None}, template="plain"))
    assert (dolly.train, dolly.test, dolly.source) == (7505, 7506, "databricks/databricks-dolly-15k")
    assert dolly.columns.model_dump() == {
        "prompt": "instruction", "target": "response", "context": "context", "category": None
    }  # fmt: skip
    assert dolly.template == "plain"
    mine = with_preset(Data(preset="dolly", tokenizer="t", test=5))
    assert (mine.train, mine.test) == (None, 5)
    gsm8k = with_preset(Data(preset="gsm8k", tokenizer="t", train=5))
    assert (gsm8k.source, gsm8k.subset, gsm8k.columns.target) == ("openai/gsm8k", "main", "answer")
    assert with_preset(Data(preset="gsm8k", source="a.jsonl", tokenizer="t", train=5)).subset is None


@needs_shared
def test_dolly_preset_on_its_own_rows(store, byte_tokenizer):
    limits = {"max_prompt_tokens": 100_000, "max_target_tokens": 100_000}
    shared = {"preset": "dolly", "source": str(SHARED / "dolly-150.jsonl"), "tokenizer": byte_tokenizer, **limits}
    with pytest.raises(InputError, match=r"data\.train 7,505 \+ data\.test 7,506: only 151 rows are left to split"):
        prepare(Data(**shared), store)
    examples = prepare(Data(**shared, train=100), store)
    assert {name: len(rows) for name, rows in by_split(examples).items()} == {"train": 100, "validation": 0, "test": 51}
    lines = (SHARED / "dolly-150.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = {row["response"]: row["context"] for row in map(json.loads, lines)}
    for example in examples.read("train").to_pylist():
        context = contexts[example["target"]]
        assert example["rendered"].endswith(
            f"### Input:\n{context}\n\n### Response:\n" if context else "\n\n### Response:\n"
        )
        assert ("### Input:" in example["rendered"]) == bool(context)


# ── the split ────────────────────────────────────────────────────────────────────────────────────────────────────

prompts = st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=12, max_size=60)


def sides(rows, train, validation=0, test=None, seed=0):
    """Rows (prompts, perhaps equal) by split, ordered by the hash of (seed, prompt) as design §4 has it."""
    ordered = sorted(rows, key=lambda row: digest([seed, row]))
    first, second, third = split_ends([digest([seed, row]) for row in ordered], train, validation, test)
    return ordered[:first], ordered[first:second], ordered[second:third]


@given(prompts, st.integers(1, 6), st.integers(0, 4))
def test_equal_prompts_stay_on_one_side(rows, train, validation):
    try:
        parts = sides(rows, train, validation)
    except InputError as error:
        assert "none is left for data.validation" in str(error)  # noqa: PT017
        return
    assert len(parts[0]) >= train
    assert sum(map(len, parts)) == len(rows)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(parts[one]) & set(parts[other])


@given(st.sets(st.text(max_size=8), min_size=20, max_size=60), st.integers(1, 19), st.integers(0, 5))
def test_adding_rows_moves_none_but_at_the_boundary(texts, train, seed):
    rows = sorted(texts)
    old, new = rows[:-10], rows
    train = min(train, len(old))
    before, _, _ = sides(old, train, seed=seed)
    after, _, _ = sides(new, train, seed=seed)
    assert len(before) == len(after) == train
    assert set(after) - set(before) <= set(new) - set(old)  # no row came over from the test side
    assert len(set(before) - set(after)) <= 10
    assert before == sides(old[::-1], train, seed=seed)[0]


def test_boundary_moves_behind_equal_prompts():
    assert split_ends("aabbbc", 1, 0, None) == (2, 2, 6)
    assert split_ends("aabbbc", 3, 1, None) == (5, 6, 6)
    assert split_ends("abcdef", None, 1, 2) == (3, 4, 6)
    assert split_ends("abcdef", 2, 1, 2) == (2, 3, 5)  # what is left over is in no split
    assert split_ends("abcdef", 2, 1, 10) == (2, 3, 6)  # as many as there are
    assert split_ends("abcdef", 6, 0, None) == (6, 6, 6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((5, 2, None), r"data\.train 5 \+ data\.validation 2: only 6 rows are left to split"),
        ((None, 2, 4), r"data\.validation 2 \+ data\.test 4: only 6 rows are left to split"),
        ((6, 0, 3), r"data\.train 6 \+ data\.test 3: of 6 rows none is left for data\.test"),
        ((3, 3, 1), r"data\.train 3 \+ data\.validation 3 \+ data\.test 1: of 6 rows none is left for data\.test"),
    ],
)
def test_splits_that_cannot_be_filled(numbers, message):
    with pytest.raises(InputError, match=message):
        split_ends("abcdef", *numbers)


def test_order_is_fixed_by_seed_and_prompt_not_by_the_source(tmp_path, store, byte_tokenizer):
    rows = [*pairs(30), {"prompt": "question 3", "target": "another answer"}]
    one, other = jsonl(tmp_path / "1.jsonl", rows), jsonl(tmp_path / "2.jsonl", rows[::-1])
    shared = {"tokenizer": byte_tokenizer, "train": 10, "validation": 5, "test": 8}
    splits = [by_split(prepare(Data(source=s, **shared), store), "example_id") for s in (one, other)]
    assert splits[0] == splits[1]
    prepared = by_split(prepare(Data(source=one, **shared), store))
    in_order = prepared["train"] + prepared["validation"] + prepared["test"]
    assert in_order == sorted(in_order, key=lambda prompt: digest([0, prompt]))
    assert by_split(prepare(Data(source=one, **shared, split_seed=1), store))["train"] != prepared["train"]


# ── cut text ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(2, 12), st.floats(0, 1))
def test_pieces_are_the_article_without_gaps(ids, size, share):
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
    examples = prepare(Data(**shared, piece_tokens=40), store)
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
    assert examples.rendering["piece_tokens"] == 40
    assert examples.rendering["prompt_share"] == 0.15


def test_a_piece_that_is_no_longer_the_end_is_another_example(tmp_path, store, byte_tokenizer):
    article = tmp_path / "a.txt"
    shared = {"preset": "text", "source": str(article), "tokenizer": byte_tokenizer, "train": 1, "piece_tokens": 20}
    article.write_text("abcdefghijklmnopqrst")  # one token per byte: exactly one piece
    (before,) = prepare(Data(**shared), store).read("train").to_pylist()
    article.write_text("abcdefghijklmnopqrstuvwxyz" + "0123456789")
    longer = prepare(Data(**shared | {"train": 2}), store).read("train").to_pylist()
    (after,) = (row for row in longer if row["prompt"] == before["prompt"])
    assert (before["target"], before["ends"], after["ends"]) == (after["target"], True, False)
    assert before["target_ids"] == [*after["target_ids"], EOS]
    assert before["example_id"] != after["example_id"]


def test_ends_of_articles_too_short_for_a_piece_are_counted(tmp_path, store, byte_tokenizer, caplog):
    articles = ["x" * 49, "y" * 55, "z" * 9, "w" * 40]  # 20 + 20 + 9, 20 + 20 + 15, 9, 20 + 20
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in articles])
    shared = {"preset": "text", "source": source, "tokenizer": byte_tokenizer, "piece_tokens": 20, "max_rejected": 1}
    with caplog.at_level(logging.INFO):
        facts = prepare(Data(**shared, train=1), store).product.manifest
    assert facts["short_ends"] == 2
    assert (facts["rows_read"], facts["rejected"]) == (4, {"duplicate": 2})  # the second pieces of x and of y
    assert "2 ends of articles shorter than half a piece left out" in caplog.messages[-1]


def test_pieces_must_fit_the_limits_and_have_no_template(tmp_path, store, byte_tokenizer):
    (tmp_path / "a.txt").write_text("x" * 5000)
    shared = {"preset": "text", "source": str(tmp_path / "a.txt"), "tokenizer": byte_tokenizer, "train": 1}
    with pytest.raises(InputError) as error:
        prepare(Data(**shared, piece_tokens=1000), store)
    assert str(error.value) == (
        "data.max_target_tokens is 512, but data.piece_tokens 1000 and data.prompt_share 0.15 make targets "
        "(with the EOS token) of 851 tokens: raise it to that"
    )
    with pytest.raises(InputError, match="template has no meaning for the preset text"):
        prepare(Data(**shared, template="dolly"), store)
    (tmp_path / "a.txt").write_text("x" * 200)
    with pytest.raises(InputError, match="shorter than half a piece"):
        prepare(Data(**shared), store)


def test_python_docs_with_a_tokenizer_made_from_them(store):
    config = Data(preset="python-docs", tokenizer={"vocab_size": 300}, train=10, test=20, max_rows=3, piece_tokens=32)
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


# ── reuse ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_address_depends_on_what_decides_the_values_only(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", pairs(20))
    shared = {"source": source, "tokenizer": byte_tokenizer, "train": 10}
    path = prepare(Data(**shared), store).product.path
    for same in ({"max_rejected": 0.5}, {"piece_tokens": 9}, {"source": jsonl(tmp_path / "copy.jsonl", pairs(20))}):
        assert prepare(Data(**(shared | same)), store).product.path == path
    for other in (
        {"train": 9},
        {"split_seed": 1},
        {"max_target_tokens": 99},
        {"template": "{prompt}"},
        {"max_rows": 19},
    ):
        assert prepare(Data(**(shared | other)), store).product.path != path


def test_a_category_may_be_a_number(tmp_path, store, byte_tokenizer):
    categories = [0, 2.5, "c", None, "", ["x"]]
    rows = [{**pair, "kind": kind} for pair, kind in zip(pairs(6), categories, strict=True)]
    columns = {"category": "kind"}
    source = jsonl(tmp_path / "a.jsonl", rows)
    made = prepare(Data(source=source, columns=columns, tokenizer=byte_tokenizer, train=5, max_rejected=0.2), store)
    table = made.read("train")
    found = dict(zip(table["prompt"].to_pylist(), table["category"].to_pylist(), strict=True))
    assert found == {f"question {n}": kind for n, kind in enumerate(["0", "2.5", "c", None, None])}
    (rejected,) = pq.read_table(made.product.path / "rejected.parquet").to_pylist()
    assert rejected["detail"] == "column kind (data.columns.category) has type list: ['x']"


def test_rejected_rows_are_left_to_look_at(tmp_path, store, byte_tokenizer):
    rows = [*({**pair, "prompt": [pair["prompt"]]} for pair in pairs(3)), {"prompt": "p"}, *pairs(2)]
    source, run_dir = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(InputError) as error:
        prepare(Data(source=source, tokenizer=byte_tokenizer, train=2), store, run_dir)
    assert str(error.value) == (
        f"data.source {source}: 4 of 6 rows were rejected (3 not text, 1 missing field), more than data.max_rejected "
        "0.1 allows; see a.jsonl:1 (not text: column prompt (data.columns.prompt) has type list: ['question 0']), "
        "a.jsonl:4 (missing field: column target (data.columns.target)); all of them are in "
        f"{run_dir / 'rejected.parquet'}; correct them or raise the limit"
    )
    left = pq.read_table(run_dir / "rejected.parquet")
    assert left.schema.equals(REJECTED)
    assert left["source"].to_pylist() == [f"a.jsonl:{n}" for n in range(1, 5)]
    prepare(Data(source=source, tokenizer=byte_tokenizer, train=2, max_rejected=0.7), store, run_dir)
    assert not (run_dir / "rejected.parquet").exists(), "it is beside the examples now"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[1].content }}", "list object has no element 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_chat_template_that_fails(tmp_path, store, byte_tokenizer, template, said):
    folder = tmp_path / "tokenizer"
    shutil.copytree(byte_tokenizer, folder)
    (folder / "chat_template.jinja").write_text(template)
    source = jsonl(tmp_path / "a.jsonl", pairs(3))
    with pytest.raises(InputError) as error:
        prepare(Data(source=source, tokenizer=str(folder), template="chat", train=2), store)
    assert str(error.value) == (
        f"tokenizer {folder}: its chat template fails on a user's message ({said}); correct the chat template, "
        "or set data.template to plain, dolly or a text with {prompt}"
    )


def test_examples_found_again_are_held_to_the_limit_on_rejected_rows(tmp_path, store, byte_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [*pairs(4), {"prompt": "", "target": "a"}])
    shared = {"source": source, "tokenizer": byte_tokenizer, "train": 2, "test": 1}
    made = prepare(Data(**shared, max_rejected=1), store)
    for again in (prepare, find_examples):
        with pytest.raises(InputError) as error:
            again(Data(**shared), store)
        assert str(error.value) == (
            f"data.source {source}: 1 of 5 rows were rejected (1 empty prompt), more than data.max_rejected 0.1 "
            "allows; see a.jsonl:5 (empty prompt: column prompt (data.columns.prompt) is ''); all of them are in "
            f"{made.product.path / 'rejected.parquet'}; correct them or raise the limit"
        )
    found = find_examples(Data(**shared, max_rejected=0.2), store)
    assert found is not None
    assert found.product.path == made.product.path


def test_complete_examples_are_found_without_loading_anything_heavy(tmp_path, store, caplog):
    source = jsonl(tmp_path / "a.jsonl", pairs(20))
    config = Data(source=source, tokenizer={"vocab_size": 260}, train=10)
    made = prepare(config, store)
    with caplog.at_level(logging.INFO):
        assert prepare(config, store).rendering == made.rendering
    assert caplog.messages == [f"examples: 10 train, 0 validation, 10 test; 0 rejected (found in {made.product.name})"]
    program = f"""
import sys
from pathlib import Path
from cpo_pipe.data.recipe import Data
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.prepare import prepare
config = Data.model_validate_json({config.model_dump_json(exclude_unset=True)!r})
print(prepare(config, Store(Path({str(store.root)!r}))).product.path)
print([name for name in ("torch", "transformers", "datasets", "tokenizers") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [str(made.product.path), "[]"]
