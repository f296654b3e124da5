"""Negatives from a file, and from a model with another tokenizer."""

import io
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.end_tokens import end_tokens
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, locate_tokenizer
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import plan_negatives
from cpo_pipe.pipeline.negatives.pool import (
    ContinuationEncoder,
    Pool,
    PoolFileWork,
    PoolModelWork,
    other_tokenizer,
    pool_file_spec,
    pool_model_spec,
    text_behind,
)
from cpo_pipe.pipeline.negatives.pool_file import Columns, PoolFile
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.samples import LazyEngine, SampleRequest, make_missing
from tests.support.pairs import write_jsonl
from tests.support.project import Project

CUT_EXAMPLE = {"ends": False}
"""An example whose target has no end token."""
PAIRS = [{"prompt": f"say {n}", "target": f" fox {n}"} for n in range(6)]


class Bench:
    """A store with examples, and the pools made for them."""

    def __init__(self, root: Path, tokenizer: Path, rows: Sequence[dict[str, str]] = PAIRS, **data: Any):
        self.root, self.store = root, Store(root / "store")
        source = str(write_jsonl(root / "pairs.jsonl", list(rows)))
        config = Pairs(source=source, tokenizer=str(tokenizer), train=len(rows), **data)
        self.examples: Examples = prepare(config, self.store)
        self.selection = self.examples.read("train")
        self.tokenizer = self.examples.tokenizer.load()

    def from_file(
        self, path: Path, count: int = 1, max_tokens: int = 40, pool: str = "other", **columns: str
    ) -> dict[str, list[dict[str, Any]]]:
        """The negatives of each prompt, in order."""
        key = f"negatives.sources.{pool}"
        source = locate_source(str(path), key=f"{key}.file", columns_key=f"{key}.columns")
        file, identity = PoolFile(source, Columns.model_validate(columns)), source.identity(self.store.hash_file)
        file.check()
        self.spec = pool_file_spec(self.examples.rendering, identity, file.columns, max_tokens)
        self.rows, self.refused = (
            self.store.rows("negatives", self.spec),
            self.store.rows("rejected", {"of": self.spec}),
        )
        selection = self.selection.select(["example_id", "prompt"])
        work = PoolFileWork(
            self.rows, self.refused, file, identity, selection, count, self.examples.tokenizer, self.examples.rendering,
            max_tokens,
        )  # fmt: skip
        return self._made(work, count)

    def from_model(
        self, folder: Path, sampling: Sampling, count: int = 1, template: str = "plain", seed: int = 0
    ) -> dict[str, list[dict[str, Any]]]:
        """The negatives of each prompt, in order."""
        model = locate_model(str(folder), self.store)
        own = other_tokenizer(model, self.examples.tokenizer, self.store)
        assert own is not None
        self.spec = pool_model_spec(self.examples.rendering, model.fingerprint, own.fingerprint, sampling, seed)
        self.rows, self.refused = (
            self.store.rows("negatives", self.spec),
            self.store.rows("rejected", {"of": self.spec}),
        )
        work = PoolModelWork(
            self.rows,
            self.refused,
            LazyEngine("transformers", model),
            own,
            {"template": template},
            sampling,
            seed,
            self.examples.tokenizer,
            {"strategy": "pool", "generator": model.fingerprint},
        )
        return self._made(work, count)

    def _made(self, work: PoolFileWork | PoolModelWork, count: int) -> dict[str, list[dict[str, Any]]]:
        work = pickle.loads(pickle.dumps(work))
        wanted = SampleRequest(self.rows, count, self.refused)
        self.made = make_missing(wanted, self.selection, work, LocalExecutor(), batch_size=4, label="pool")
        assert not wanted.missing(self.selection["example_id"]).any(), "what cannot be made is refused"
        prompts = dict(zip(*(self.selection[name].to_pylist() for name in ("example_id", "prompt")), strict=True))
        found: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in prompts.values()}
        for row in self.rows.read(list(prompts)).to_pylist():
            found[prompts[row["example_id"]]].append(row)
        return found

    def refusals(self) -> list[tuple[str, str]]:
        """Reason and sample of each."""
        rows = self.refused.read(self.selection["example_id"].to_pylist()).to_pylist()
        return [(row["reason"], row["source"]) for row in rows]


def texts(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {prompt: [row["text"] for row in rows] for prompt, rows in found.items()}


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(bench: Bench) -> list[dict[str, str]]:
    """One continuation of each prompt and one of a prompt that is not asked for, in an order of their own."""
    prompts = [*bench.selection["prompt"].to_pylist(), "say what"]
    return [{"prompt": prompt, "text": f" dog {prompt}"} for prompt in sorted(prompts, reverse=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_continuations_are_matched_by_prompt(bench: Bench, tmp_path: Path, suffix: str) -> None:
    found = bench.from_file(write(tmp_path / f"pool{suffix}", rows_of(bench)))
    assert texts(found) == {row["prompt"]: [f" dog {row['prompt']}"] for row in PAIRS}
    for rows in found.values():
        (row,) = rows
        assert row["token_ids"] == [*bench.tokenizer.encode(row["text"]), 0], "as a target"
        assert (row["strategy"], row["finish_reason"], row["logprob"], row["engine"]) == ("pool", "stop", None, None)
        assert row["generator"] == bench.spec["file"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_rows_of_one_prompt_and_lists_add_up_in_the_order_of_the_file(
    bench: Bench, tmp_path: Path, suffix: str
) -> None:
    rows = [
        {"prompt": "say 1", "text": ["a", "b"]},
        {"prompt": "say 2", "text": []},
        {"prompt": "say 0", "text": ["x"]},
        {"prompt": "say 1", "text": ["a", "c", "d"]},
    ]
    found = texts(bench.from_file(write(tmp_path / f"pool{suffix}", rows), count=4))
    assert found.pop("say 1") == ["a", "b", "a", "c"]
    assert found.pop("say 0") == ["x"]
    assert not any(found.values())
    assert bench.made == 24
    assert len(bench.refusals()) == 24 - 5
    assert set(bench.refusals()) == {("not in the file", f"sample:{k}") for k in range(4)}


def message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_messages_are_their_content(bench: Bench, tmp_path: Path, suffix: str) -> None:
    plain = rows_of(bench)
    talk = [{"prompt": message("user", row["prompt"]), "rejected": message("assistant", row["text"])} for row in plain]
    found = texts(bench.from_file(write(tmp_path / f"talk{suffix}", talk), text="rejected"))
    assert found == texts(bench.from_file(write(tmp_path / f"plain{suffix}", plain)))
    mixed = [{"prompt": row["prompt"], "rejected": message("assistant", row["text"])} for row in plain]
    assert texts(bench.from_file(write(tmp_path / f"mixed{suffix}", mixed), text="rejected")) == found


def test_a_folder_is_its_parquet_files_in_order(bench: Bench, tmp_path: Path) -> None:
    """As a data set of the hub lies there: files in a subfolder, beside others."""
    folder = tmp_path / "pool"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    files = [folder / "data" / f"train-{n:05}.parquet" for n in range(3)]
    for n, path in enumerate(files):
        write(path, [{"prompt": row["prompt"], "text": text} for row in PAIRS for text in (f"{n} a", f"{n} b")])
    found = bench.from_file(folder, count=5)
    assert texts(found)["say 1"] == ["0 a", "0 b", "1 a", "1 b", "2 a"]
    name = bench.rows.name
    bench.from_file(folder.rename(tmp_path / "moved"), count=5)
    assert (bench.rows.name, bench.made) == (name, 0), "its identity is the content"
    files = [tmp_path / "moved" / "data" / path.name for path in files]
    files[0].rename(tmp_path / "moved" / "data" / "train-00009.parquet")
    assert texts(bench.from_file(tmp_path / "moved", count=5))["say 1"] == ["1 a", "1 b", "2 a", "2 b", "0 a"]
    assert bench.rows.name != name, "and its order"


def test_a_bad_folder_is_one_line(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    with pytest.raises(InputError, match=r"file .*pool: not readable as a data set \("):
        bench.from_file(folder)
    write(folder / "a.parquet", [{"prompt": "say 1", "text": "a"}])
    write(folder / "b.parquet", [{"prompt": "say 1", "out": "a"}])
    with pytest.raises(InputError, match=r"file .*pool: b\.parquet: no column 'text'"):
        bench.from_file(folder)


def test_two_examples_of_one_prompt_both_get_them(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model, [*PAIRS, {"prompt": "say 1", "target": " cat"}])
    found = bench.from_file(write(tmp_path / "pool.jsonl", rows_of(bench)))
    assert texts(found)["say 1"] == [" dog say 1"] * 2


def test_unicode_is_compared_character_by_character(tmp_path: Path, tiny_model: Path) -> None:
    composed, decomposed = "caf\u00e9 🦊\u2028", "cafe\u0301 🦊\u2028"
    bench = Bench(tmp_path, tiny_model, [{"prompt": composed, "target": "a"}, {"prompt": decomposed, "target": "b"}])
    rows = [{"prompt": decomposed, "text": "né🐶\n"}, {"prompt": composed, "text": ""}]
    found = bench.from_file(write(tmp_path / "pool.jsonl", rows))
    assert texts(found) == {composed: [""], decomposed: ["né🐶\n"]}
    assert found[composed][0]["token_ids"] == [0], "an empty answer is one"
    assert bench.tokenizer.decode(found[decomposed][0]["token_ids"][:-1]) == "né🐶\n"


def test_a_context_is_a_part_of_the_prompt(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"q": f"q{n}", "c": "" if n else "con\ntext", "target": f"t{n}"} for n in range(2)]
    bench = Bench(tmp_path, tiny_model, rows, columns={"prompt": "q", "context": "c"}, template="dolly")
    pool = [{"q": "q0", "c": "con\ntext", "a": "x"}, {"q": "q1", "c": None, "a": "y"}]
    apart = bench.from_file(write(tmp_path / "pool.jsonl", pool), prompt="q", context="c", text="a")
    pool = [{"q": "q0\n\ncon\ntext", "a": "x"}, {"q": "q1", "a": "y"}]
    joined = bench.from_file(write(tmp_path / "joined.jsonl", pool), prompt="q", text="a")
    assert texts(apart) == texts(joined) == {"q0\n\ncon\ntext": ["x"], "q1": ["y"]}


def test_a_column_with_example_ids_goes_before_the_prompt(bench: Bench, tmp_path: Path) -> None:
    ids = dict(zip(*(bench.selection[name].to_pylist() for name in ("prompt", "example_id")), strict=True))
    rows = [{"example_id": ids["say 2"], "prompt": "say 1", "text": "a"}, {"example_id": ids["say 3"], "text": "b"}]
    found = texts(bench.from_file(write(tmp_path / "pool.jsonl", rows)))
    assert {prompt: rows for prompt, rows in found.items() if rows} == {"say 2": ["a"], "say 3": ["b"]}


def test_what_is_too_long_is_cut_and_does_not_end(bench: Bench, tmp_path: Path) -> None:
    text = "the quick brown fox"
    ids = bench.tokenizer.encode(text)
    path = write(tmp_path / "pool.jsonl", [{"prompt": row["prompt"], "text": text} for row in PAIRS])
    for tokens in range(1, len(ids) + 2):
        row = bench.from_file(path, max_tokens=tokens)["say 1"][0]
        assert row["token_ids"] == [*ids, 0][:tokens]
        assert row["finish_reason"] == ("stop" if tokens > len(ids) else "length")
        assert row["text"] == (bench.tokenizer.decode(ids[:tokens]) if tokens < len(ids) else text)


def test_copies_of_the_target_stay_until_rank(bench: Bench, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "text": row["target"]} for row in PAIRS]
    found = bench.from_file(write(tmp_path / "pool.jsonl", rows))
    targets = dict(zip(*(bench.selection[name].to_pylist() for name in ("prompt", "target_ids")), strict=True))
    assert {prompt: rows[0]["token_ids"] for prompt, rows in found.items()} == targets


def test_coverage_is_said_once(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "say 1", "text": ["a", "b", "c"]}, {"prompt": "say 2", "text": ["a"]}]
    path = write(tmp_path / "pool.jsonl", rows)
    bench.from_file(path, count=2)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"negatives.sources.other.file {path}: has 2 of 6 prompts, 1 of them with 2 continuations; others get fewer"
    ]
    caplog.clear()
    bench.from_file(path, count=2)
    assert (bench.made, caplog.text) == (0, ""), "what is not there is not looked for again"
    bench.from_file(write(tmp_path / "whole.jsonl", rows_of(bench)))
    assert "others get fewer" not in caplog.text


def test_more_of_them_only_add(bench: Bench, tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", [{**row, "text": ["a", "b", "c"]} for row in PAIRS])
    first = bench.from_file(path)
    assert bench.made == 6
    grown = bench.from_file(path, count=3)
    assert bench.made == 12
    assert {prompt: rows[:1] for prompt, rows in grown.items()} == first
    assert [row["sample_index"] for row in grown["say 1"]] == [0, 1, 2]


def test_the_identity_is_the_content(bench: Bench, tmp_path: Path) -> None:
    rows = rows_of(bench)
    bench.from_file(write(tmp_path / "pool.jsonl", rows))
    name = bench.rows.name
    bench.from_file((tmp_path / "pool.jsonl").rename(tmp_path / "renamed.jsonl"), pool="renamed")
    assert (bench.rows.name, bench.made) == (name, 0)
    bench.from_file(write(tmp_path / "changed.jsonl", [{**rows[0], "text": "!"}, *rows[1:]]))
    assert (bench.rows.name == name, bench.made) == (False, 6)
    bench.from_file(tmp_path / "renamed.jsonl", max_tokens=39)
    assert bench.made == 6


PARQUET = b"PAR1 and then nothing that is one"


def bad_list() -> bytes:
    """A Parquet file whose second list holds a text that is not UTF-8."""
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xff"]).buffers())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), texts)
    pq.write_table(pa.table({"prompt": ["say 1", "say 2"], "text": lists}), sink := io.BytesIO())
    return sink.getvalue()


TEXT, PROMPT = (f"column {name} (negatives.sources.other.columns.{name})" for name in ("text", "prompt"))
BAD = {
    "a prompt column": (
        '{"promt": "say 1", "text": "a"}',
        "no column 'prompt' (negatives.sources.other.columns.prompt); the columns there are promt, text; set",
    ),
    "a text column": (
        '{"prompt": "say 1", "out": "a"}',
        "no column 'text' (negatives.sources.other.columns.text); the columns there are prompt, out; set",
    ),
    "a number": ('{"prompt": "say 1", "text": 3}', ("not text", f"{TEXT} has type int: 3")),
    "null": ('{"prompt": "say 1", "text": null}', ("missing field", TEXT)),
    "a list of prompts": ('{"prompt": ["say 1"], "text": "a"}', ("not text", f"{PROMPT} has type list: ['say 1']")),
    "a conversation": (
        '{"prompt": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "b"}], "text": "a"}',
        ("not one message of the user", f"{PROMPT} is a conversation of 'user, assistant'"),
    ),
    "a system message": (
        '{"prompt": [{"role": "system", "content": "say 1"}], "text": "a"}',
        ("not one message of the user", f"{PROMPT} is a conversation of 'system'"),
    ),
    "two answers": (
        '{"prompt": "say 1", "text": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
        ("not one message of the assistant", f"{TEXT} is a conversation of 'assistant, user'"),
    ),
    "a message without text": (
        '{"prompt": "say 1", "text": [{"role": "assistant", "content": null}]}',
        ("missing field", TEXT),
    ),
    "parts of a message": (
        '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "say 1"}]}], "text": "a"}',
        ("not text", f"{PROMPT} has type list: [{{'text': 'say 1', 'type': 'text'}}]"),
    ),
    "half a character": (r'{"prompt": "say 1", "text": "\ud83e"}', ("not UTF-8", rf"{TEXT} is \ud83e")),
    "no object": ('["say 1", "a"]', ("not an object", '["say 1", "a"]')),
    "deep": ("[" * 100_000, ("not JSON", "[[")),
    "not UTF-8": (b'{"prompt": "say 1", "text": "caf\xe9"}', ("not UTF-8", r'{"prompt": "say 1", "text": "caf\xe9"}')),
    "compressed": (b"\x1f\x8b\x08\x00", "contains gzip; name it pool.jsonl.gz"),
    "UTF-16": ('{"prompt": "say 1", "text": "a"}'.encode("utf-16"), "contains UTF-16; save it as text in UTF-8"),
    "empty": ("\n", "has no rows; name a source that has some"),
    "others": (
        '{"prompt": "Say 1", "text": "a"}',
        "has none of the examples' 6 prompts; there is 'Say 1', the first example has 'say ",
    ),
    "other ids": (
        '{"example_id": "3", "prompt": "say 1", "text": "a"}',
        "has none of the examples' 6 example ids; there is '3'",
    ),
    "one object": (
        '{\n"prompt": "say 1", "text": "a"}',
        "must be a list of objects, or have one object per line",
        "p.json",
    ),
    "not JSON": ("[1, ", "is not JSON in row 2 (Expecting value", "pool.json"),
    "no Parquet": (PARQUET, "not a Parquet file (Parquet magic bytes not found", "pool.parquet"),
    "a suffix": ("a,b", "suffix '.xlsx' is not supported; convert it to one of .jsonl, .json, .csv, ", "pool.xlsx"),
    "articles": ("a,b", "a .txt file holds articles, not pairs; ", "pool.txt"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line(bench: Bench, tmp_path: Path, kind: str) -> None:
    content, message, name = (*BAD[kind], "pool.jsonl")[:3]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        bench.from_file(path)
    if isinstance(message, tuple):  # the only row is rejected
        reason, detail = message
        message = f"has no valid row; 1 rejected (1 {reason}); see pool.jsonl:1 ({reason}: {detail}"
    assert str(error.value).startswith(f"negatives.sources.other.file {path}: {message}")
    assert "\n" not in str(error.value)
    assert not list(bench.store.root.glob("negatives/*/shards/*"))


def test_a_bad_row_is_a_rejected_row(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        {"prompt": "say 0", "text": "a"}, {"prompt": "say 0", "text": 3}, {"prompt": "say 0", "text": "b"},
        {"prompt": "say 1", "text": ["c", None]}, {"prompt": "say 2", "text": None}, {"prompt": None, "text": "d"},
        {"prompt": "another", "text": 5}, {"text": "e"},
    ]  # fmt: skip
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{oops\n")
    found = texts(bench.from_file(path, count=2))
    assert {prompt: rows for prompt, rows in found.items() if rows} == {"say 0": ["a", "b"], "say 1": ["c"]}
    ids = dict(zip(*(bench.selection[name].to_pylist() for name in ("prompt", "example_id")), strict=True))
    refused = {
        prompt: [(row["reason"], row["detail"]) for row in bench.refused.read([ids[prompt]]).to_pylist()]
        for prompt in ("say 0", "say 1", "say 2")
    }
    assert refused == {
        "say 0": [], "say 1": [("missing field", f"pool.jsonl:4: {TEXT}")],
        "say 2": [("missing field", f"pool.jsonl:5: {TEXT}"), ("not in the file", "say 2")],
    }  # fmt: skip
    assert (
        f"negatives.sources.other.file {path}: 7 rejected (4 missing field, 2 not text, 1 not JSON); "
        f"see pool.jsonl:4 (missing field: {TEXT}), pool.jsonl:2 (not text: {TEXT} has type int: 3), pool.jsonl:9 ("
    ) in caplog.text


def test_a_list_of_texts_that_is_not_utf8_is_one_rejected_row(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "pool.parquet").write_bytes(bad_list())
    assert texts(bench.from_file(tmp_path / "pool.parquet"))["say 1"] == ["x"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl.gz", ".csv.zst"])
def test_other_formats(bench: Bench, tmp_path: Path, suffix: str) -> None:
    tab = "\t" if suffix == ".tsv" else ","
    content = f"prompt{tab}text\nsay 1{tab}a\n" if "json" not in suffix else '{"prompt": "say 1", "text": "a"}\n'
    path = tmp_path / f"pool{suffix}"
    with pa.output_stream(
        str(path), compression={"z": "gzip", "t": "zstd"}.get(suffix[-1]) if "." in suffix[1:] else None
    ) as file:
        file.write(content.encode())
    assert texts(bench.from_file(path))["say 1"] == ["a"]


def test_a_parquet_file_without_a_column_or_of_broken_pages(bench: Bench, tmp_path: Path) -> None:
    path = write(tmp_path / "pool.parquet", [{"prompt": "say 1", "output": "a", "more": 3}])
    with pytest.raises(InputError, match=r"no column 'text' \(.*\); the columns there are prompt, output, more"):
        bench.from_file(path)
    whole = bytearray(
        write(path, [{"prompt": row["prompt"], "text": row["target"] * 99} for row in PAIRS]).read_bytes()
    )
    whole[10:400] = bytes(390)
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"pool.parquet: damaged after row 0 \("):
        bench.from_file(path)
    with pytest.raises(
        InputError, match=r"gone\.jsonl: no such file; give the path of a file in one of the formats \.jsonl, \.json"
    ):
        bench.from_file(tmp_path / "gone.jsonl")


def test_columns_are_of_a_file() -> None:
    with pytest.raises(ValueError, match="columns: not used with a model; remove it"):
        Pool.model_validate({"model": "m", "columns": {"text": "a"}})
    with pytest.raises(ValueError, match="give either model or file"):
        Pool.model_validate({})
    with pytest.raises(ValueError, match="top_k: not used with a file; remove it"):
        Pool.model_validate({"file": "f.jsonl", "top_k": 5})


# ── a model ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CORPUS = ["a lazy dog says that the fox is quick and brown", "say it again: 0 1 2 3 4 5 6 7 8 9"]


def bytes_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Like SentencePiece's: a space is a part of the word behind it, and a text begins with one that is not there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(params=[bytes_tokenizer, metaspace_tokenizer])
def other_model(request: pytest.FixtureRequest, new_model: Callable[..., Path]) -> Path:
    """A model with a tokenizer of its own."""
    return with_tokenizer(new_model(seed=3, vocab_size=290, eos_token_id=1), request.param())


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)
    fast.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def sampling(folder: Path, store: Store, tokens: int = 8, top_k: int = 1) -> Sampling:
    ends = end_tokens(folder, locate_tokenizer(str(folder), store))
    return Sampling(temperature=1.0, top_k=top_k, max_new_tokens=tokens, stop_ids=ends)


@pytest.mark.parametrize("make", [bytes_tokenizer, metaspace_tokenizer])
def test_a_space_at_the_start_is_kept(make: Callable[[], Tokenizer]) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    whole = own.encode("the quick brown fox")
    for place in range(1, len(whole)):
        prompt = own.decode(whole[:place])
        assert prompt + text_behind(whole[:place], whole[place:], own) == "the quick brown fox"
    spaced = next(place for place in range(len(whole)) if own.decode(whole[:place]) == "the quick")
    assert text_behind(whole[:spaced], whole[spaced:], own) == " brown fox"
    if make is metaspace_tokenizer:
        assert own.decode(whole[spaced:]) == "brown fox", "which is what it is about"


def test_a_model_is_sampled_in_its_own_tokens(bench: Bench, other_model: Path) -> None:
    found = bench.from_model(other_model, sampling(other_model, bench.store))
    own, network = locate_tokenizer(str(other_model), bench.store).load(), None
    network = AutoModelForCausalLM.from_pretrained(other_model).eval()
    for prompt, rows in found.items():
        inputs = own(prompt, return_tensors="pt", return_token_type_ids=False)
        output = network.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)[0]
        written = output[inputs["input_ids"].shape[1] :].tolist()
        ends = written[-1] == 1
        text = own.decode(output, skip_special_tokens=True)[len(own.decode(inputs["input_ids"][0])) :]
        text = text if ends else text.rstrip("\ufffd")
        ids = bench.tokenizer.encode(text)
        ids = [*ids, 0] if ends and len(ids) < 8 else ids[:8]
        (row,) = rows
        assert row["token_ids"] == ids
        assert row["finish_reason"] == ("stop" if ids[-1] == 0 else "length")
        assert row["text"] == (text if len(bench.tokenizer.encode(text)) <= 8 else bench.tokenizer.decode(ids))
        assert row["logprob"] is None
        assert "transformers" in row["engine"]


def test_samples_depend_on_their_keys_alone(tmp_path: Path, tiny_model: Path, other_model: Path) -> None:
    roots = [tmp_path / name for name in "ab"]
    for root in roots:
        root.mkdir()
    bench = Bench(roots[0], tiny_model)
    settings = sampling(other_model, bench.store, top_k=0)
    first = bench.from_model(other_model, settings)
    assert bench.made == 6
    grown = bench.from_model(other_model, settings, count=3)
    assert bench.made == 12
    assert {prompt: rows[:1] for prompt, rows in grown.items()} == first
    again = Bench(roots[1], tiny_model, PAIRS[::-1])
    assert again.from_model(other_model, settings, count=3) == grown
    assert bench.from_model(other_model, settings, seed=1) != first
    assert bench.made == 6


def test_an_end_is_an_end_and_half_a_character_is_none(bench: Bench) -> None:
    text = "né🦊"
    whole, cut = ContinuationEncoder(bench.tokenizer, {"template": "plain"}).encode(
        [CUT_EXAMPLE] * 2, [text, text], 99, [True, False]
    )
    assert (whole.token_ids, whole.ends) == ([*bench.tokenizer.encode(text), 0], True)
    assert (cut.token_ids, cut.ends) == (bench.tokenizer.encode(text), False)


def test_special_tokens_in_continuations_are_text_but_for_an_eos_at_the_end(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = bench.selection["prompt"].to_pylist()
    written = ["a<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>", "a", "b", "c"]
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, written, strict=True)]
    found = bench.from_file(write(tmp_path / "pool.jsonl", rows))
    (a, b, c), end = (bench.tokenizer.encode(text) for text in "abc"), 0
    inside = bench.tokenizer("a<|endoftext|>b", split_special_tokens=True)["input_ids"]
    assert [found[prompt][0]["token_ids"] for prompt in prompts] == [
        [*a, end], [*inside, end], [end], [*a, end], [*b, end], [*c, end],
    ]  # fmt: skip
    assert end not in inside
    assert [found[prompt][0]["text"] for prompt in prompts] == ["a", "a<|endoftext|>b", "", "a", "b", "c"]
    assert "pool.jsonl: 3 continuations have special tokens in their text; they are text to the model" in caplog.text


def test_a_prompt_without_room_is_refused(tmp_path: Path, tiny_model: Path, new_model: Callable[..., Path]) -> None:
    long = [{"prompt": "say 1 " * 20, "target": "a"}, {"prompt": "🦊", "target": "b"}]
    bench = Bench(tmp_path, tiny_model, [*PAIRS, *long])
    small = with_tokenizer(
        new_model(seed=3, vocab_size=290, eos_token_id=1, max_position_embeddings=32), bytes_tokenizer()
    )
    found = bench.from_model(small, sampling(small, bench.store, tokens=25), count=2)
    assert {len(rows) for prompt, rows in found.items() if prompt != long[0]["prompt"]} == {2}
    assert bench.refusals() == [("prompt too long", "sample:0"), ("prompt too long", "sample:1")]
    detail = bench.refused.read(bench.selection["example_id"].to_pylist())["detail"][0].as_py()
    assert detail.endswith(" tokens, of 32")
    bench.from_model(small, sampling(small, bench.store, tokens=25), count=2)
    assert bench.made == 0


def test_a_batch_of_nothing_but_long_prompts(tmp_path: Path, tiny_model: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, tiny_model)
    small = with_tokenizer(
        new_model(seed=3, vocab_size=290, eos_token_id=1, max_position_embeddings=8), bytes_tokenizer()
    )
    found = bench.from_model(small, sampling(small, bench.store))
    assert not any(found.values())
    assert len(bench.refusals()) == 6


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def test_a_chat_is_rendered_by_the_models_own_template(
    tmp_path: Path, new_model: Callable[..., Path], other_model: Path
) -> None:
    run_model = new_model(seed=9)
    config = json.loads((run_model / "tokenizer_config.json").read_text())
    (run_model / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    bench = Bench(tmp_path, run_model, template="chat")
    with pytest.raises(InputError, match=r"model .*: data.template is chat, but its tokenizer has no chat template"):
        bench.from_model(other_model, sampling(other_model, bench.store), template="chat")
    own = PreTrainedTokenizerFast.from_pretrained(other_model)
    own.chat_template = CHAT
    own.save_pretrained(other_model)
    found = bench.from_model(other_model, sampling(other_model, bench.store), template="chat")
    network = AutoModelForCausalLM.from_pretrained(other_model).eval()
    for prompt, rows in found.items():
        inputs = own(f"<user>{prompt}<bot>", return_tensors="pt", return_token_type_ids=False)
        output = network.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)[0]
        text = own.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.startswith(rows[0]["text"]), "an answer begins a text: without the space of its first token"


def test_a_date_in_the_models_own_template_is_recorded(
    tmp_path: Path, new_model: Callable[..., Path], other_model: Path
) -> None:
    run_model = new_model(seed=9)
    templates = {
        run_model: "{% for m in messages %}{{ m.content }}{% endfor %}",
        other_model: f"{{{{ strftime_now('%Y') }}}}{CHAT}",
    }
    for folder, template in templates.items():
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        loaded.chat_template = template
        loaded.save_pretrained(folder)
    bench = Bench(tmp_path, run_model, template="chat")
    config = Negatives.model_validate({"sources": {"other": {"strategy": "pool", "model": "other"}}})
    other = locate_model(str(other_model), bench.store)
    (job,) = plan_negatives(config, bench.store, bench.examples, lambda *_, **__: other, 8).jobs
    assert isinstance(job.work, PoolModelWork)
    assert job.work.chat_date == job.source.rows.spec["chat_date"] == chat_date(job.work.own_tokenizer, bench.store)


def test_which_tokenizer_is_another(bench: Bench, tmp_path: Path, other_model: Path, tiny_model: Path) -> None:
    def find(folder: Path) -> TokenizerFiles | None:
        return other_tokenizer(locate_model(str(folder), bench.store), bench.examples.tokenizer, bench.store)

    assert find(tiny_model) is None
    found = find(other_model)
    assert found is not None
    assert found.path == other_model
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model / name).read_bytes())
    assert find(bare) is None


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pools(project: Project, new_model: Callable[..., Path]) -> Project:
    """A recipe with a mixture of three pools and autoregressive negatives, prepared."""
    other_model = with_tokenizer(new_model(seed=3, vocab_size=290, eos_token_id=1), bytes_tokenizer())
    recipe = yaml.safe_load((project.root / "tiny.yaml").read_text())
    samples = {"max_new_tokens": 8, "engine": "transformers"}
    recipe["negatives"]["sources"] = {
        "autoregressive": {"model": str(project.model), "count": 2, **samples},
        "strong": {"strategy": "pool", "file": "strong.jsonl", "count": 2, "strength": 2, "max_new_tokens": 8},
        "weak": {"strategy": "pool", "model": str(other_model), "count": 2, "strength": 1, **samples},
        "same": {"strategy": "pool", "model": str(new_model(seed=5)), "strength": 0, **samples},
    }
    recipe["rank"] = {}
    project.write("tiny.yaml", yaml.safe_dump(recipe, sort_keys=False))
    pairs = [json.loads(line) for line in (project.root / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": pair["prompt"], "text": [pair["target"], f" dog {pair['prompt']}"]} for pair in pairs[:20]]
    project.write("strong.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert project.cli("prepare", "tiny.yaml").status == 0
    return project


def groups(project: Project) -> list[dict[str, Any]]:
    return [group for path in project.store.glob("groups/*/shards/*") for group in pq.read_table(path).to_pylist()]


def test_a_mixture_with_pools_makes_ragged_groups(pools: Project) -> None:
    generated = pools.cli("generate-negatives", "tiny.yaml")
    assert generated.status == 0, generated.err
    assert "negatives.sources.strong.file strong.jsonl: has " in generated.err
    ranked = pools.cli("rank", "tiny.yaml")
    assert ranked.status == 0, ranked.err
    assert "copy of the target" in ranked.err
    made = groups(pools)
    assert len(made) == 16
    for group in made:
        names = [candidate["strategy"] for candidate in group["candidates"]]
        order = ["target", "autoregressive", "strong", "weak", "same"]
        assert sorted(names, key=order.index) == names, "a candidate can be led back to its pool"
        assert names.count("strong") <= 1, "of its two one is the target"
        assert sorted(candidate["rank"] for candidate in group["candidates"]) == list(range(len(names)))
    assert {"strong" in str(group) for group in made} == {True, False}
    before = pools.made()
    there = sum(pq.read_metadata(file).num_rows for file in pools.store.glob("negatives/*/shards/*.parquet"))
    for said, column in ((generated.err, "made"), (pools.cli("generate-negatives", "tiny.yaml").err, "reused")):
        counts = [int(count) for count in re.findall(rf"(\d+) {column}\b", said)]
        assert sum(counts) == there, "what was refused was neither made nor reused"
        assert "strong cannot be made; the reasons are in rejected/" in said
    assert pools.cli("rank", "tiny.yaml").status == 0
    assert pools.made() == before


def test_a_file_that_cannot_be_used_is_named_before_anything_is_sampled(pools: Project) -> None:
    pools.write("strong.jsonl", '{"prompt": "say the 0", "answer": "x"}\n')
    result = pools.cli("generate-negatives", "tiny.yaml")
    assert result.status == 2
    assert "no column 'text' (negatives.sources.strong.columns.text)" in result.error()
    assert not list(pools.store.glob("negatives/*/shards/*.parquet"))


def test_names_and_strengths_are_not_identity_of_negatives(pools: Project) -> None:
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    before = pools.made()
    recipe = (pools.root / "tiny.yaml").read_text().replace("strong:", "gold:").replace("strength: 2", "strength: 9")
    (pools.root / "strong.jsonl").rename(pools.root / "gold.jsonl")
    pools.write("tiny.yaml", recipe.replace("strong.jsonl", "gold.jsonl"))
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    assert pools.made() == before
    assert pools.cli("generate-negatives", "tiny.yaml", "--set", "negatives.sources.gold.count=3").status == 0
    assert len(set(pools.made()) - set(before)) == 2, "one more of each, none of which is there: reasons alone"
    pools.write("gold.jsonl", (pools.root / "gold.jsonl").read_text().replace("dog", "cat"))
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    assert len({path.split("/")[1] for path in set(pools.made()) - set(before) if path.startswith("negatives")}) == 1


BAD_RUNS = {
    "negatives.sources.strong.file=gone.jsonl": "negatives.sources.strong.file gone.jsonl: no such file",
    "negatives.sources.strong.file=tiny.yaml": "strong.file tiny.yaml: suffix '.yaml' is not supported; ",
    "negatives.sources.strong.columns={text: txt}": "no column 'txt' (negatives.sources.strong.columns.text);",
    "negatives.sources.weak.model=gone/model": "model gone/model: no such folder or training",
    "negatives.sources.weak.strategy=pol": "negatives.sources.weak: unknown strategy 'pol'; did you mean pool?",
    "negatives.sources.weak.file=strong.jsonl": "negatives.sources.weak: give either model or file",
}


@pytest.mark.parametrize("override", BAD_RUNS)
def test_a_bad_pool_is_one_line(pools: Project, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pools.cli("generate-negatives", "tiny.yaml", "--set", override)
    assert result.status == 2
    assert BAD_RUNS[override] in result.error()


@pytest.mark.parametrize(("kind", "doubled"), [("ByteLevel", False), ("Metaspace", False), ("Llama", True)])
def test_only_a_space_that_would_be_doubled_is_taken_off(kind: str, doubled: bool) -> None:
    """Of a text with a space at its start: indented code keeps its spaces where the tokenizer adds none to them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" if kind == "ByteLevel" else "\N{LOWER ONE EIGHTH BLOCK}"
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(["</s>", space, "a", "b"])}, []))
    if kind == "ByteLevel":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    elif kind == "Metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoder = ContinuationEncoder(tokenizer, {"template": "plain"})
    spaced, plain = encoder.encode([CUT_EXAMPLE] * 2, ["  b", "b"], 99, [True, True])
    assert plain.token_ids == [1, 3, 0]
    assert spaced.token_ids == [1, 1, 3, 0], "two spaces, of which one is the tokenizer's own"
    assert spaced.text == (" b" if doubled else "  b")


def test_columns_of_one_name_are_refused_and_folders_of_save_to_disk_are_read(bench: Bench, tmp_path: Path) -> None:
    from datasets import Dataset

    table = pa.table([["say 0"], ["one"], ["two"]], names=["prompt", "text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match=r"twice\.parquet: has two columns named 'text'; rename or remove one"):
        bench.from_file(tmp_path / "twice.parquet")
    Dataset.from_dict({"prompt": ["say 0"], "text": ["one"]}).save_to_disk(tmp_path / "saved")
    assert texts(bench.from_file(tmp_path / "saved"))["say 0"] == ["one"]
