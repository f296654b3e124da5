"""Continuations from a file."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.negatives.pool import (
    Pool,
)
from tests.support.pools import PAIRS, Bench, rows_of, texts, write


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


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
    "not JSON": ("[1, ", "is not JSON (Expecting value", "pool.json"),
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


def test_columns_of_one_name_are_refused_and_folders_of_save_to_disk_are_read(bench: Bench, tmp_path: Path) -> None:
    from datasets import Dataset

    table = pa.table([["say 0"], ["one"], ["two"]], names=["prompt", "text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match=r"twice\.parquet: has two columns named 'text'; rename or remove one"):
        bench.from_file(tmp_path / "twice.parquet")
    Dataset.from_dict({"prompt": ["say 0"], "text": ["one"]}).save_to_disk(tmp_path / "saved")
    assert texts(bench.from_file(tmp_path / "saved"))["say 0"] == ["one"]
