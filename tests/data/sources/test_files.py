"""Files of each format, compressed, several at once and in folders; the rows are those written in each test."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.data.sources.files import format_of
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Row

TALK = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": 'a\tb,\n"c"'}]
ROWS: list[dict[str, Any]] = [{"q": "1", "a": TALK}, {"q": "2", "a": [TALK[0]]}]
JSON_ROWS = [{**row, "a": json.dumps(row["a"])} for row in ROWS]
"""A table of texts has no nested values: JSON in it stays text."""


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows by the suffixes of a name."""
    kind = format_of(path) or ""
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = io.StringIO()
    if kind.startswith((".csv", ".tsv")):
        table = csv.DictWriter(text, ["q", "a"], delimiter="\t" if "tsv" in kind else ",")
        table.writeheader()
        table.writerows(rows)
    elif kind.startswith(".jsonl"):
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        json.dump(rows, text, indent=1)
    content = text.getvalue().encode()
    path.write_bytes(content)
    if compression := {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower()):
        with pa.output_stream(str(path), compression=compression) as file:
            file.write(content)
    return path


def values(location: object, **options: str) -> list[Any]:
    return [row.values if isinstance(row, Row) else row.reason for row in locate_source(str(location), **options).read(
        {"prompt": "q", "target": "a"}
    )]  # fmt: skip


@pytest.mark.parametrize(
    "suffix",
    [".json", ".json.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ", ".csv", ".csv.gz", ".csv.zst", ".tsv",
     ".tsv.gz", ".parquet"],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table = ".csv" in suffix or ".tsv" in suffix
    rows = JSON_ROWS if table else ROWS
    path = write(tmp_path / f"my.pairs{suffix}", rows)
    assert values(path) == rows
    source = locate_source(str(path))
    assert source.count() == 2
    first = next(source.read({"prompt": "q"}))
    lines = table or "jsonl" in suffix.lower()
    assert first.source == f"{path.name}:{1 + table if lines else 1}"
    assert source.identity(sha256_file) == {"kind": suffix.lower(), "sha256": sha256_file(path)}


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf\n" + "".join(json.dumps(row) + "\n" for row in ROWS).encode() + b"oops")
    assert values(path) == [*ROWS, "not JSON"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "data": []\n}', "must be a list of objects, or have one object per line"),
        ('[{"q": "1", "a": "x"} {"q": "2"}]', "is not JSON (Expecting ',' delimiter: line 1 column 23"),
        ('[{"q": "1", "a": "x"},]', "is not JSON (Expecting value: line 1 column 23"),
        ('[{"q": "1", "a": "x"}', "is not JSON (Expecting ',' delimiter: line 1 column 22"),
        ('[{"q": "1", "a": "x"}]\n[]', "is not JSON (Extra data: line 2 column 1"),
        (b'[{"q": "\xff"}]', "is not UTF-8 (byte 8)"),
        ("[ \n]", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        values(path)
    assert str(error.value).startswith(f"data.source {path}: {message}")
    assert "\n" not in str(error.value)


def test_an_item_of_a_list_that_is_no_object_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff [ 3,\n{"q": "1", "a": "x"} , null ]')
    rows = list(locate_source(str(path)).read({"prompt": "q"}))
    assert [(row.source, getattr(row, "reason", None)) for row in rows] == [
        ("a.json:1", "not an object"), ("a.json:2", None), ("a.json:3", "not an object"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_or_other_compressed_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": str(n), "a": str(n**3)} for n in range(20_000)]
    path = write(tmp_path / f"a.jsonl{suffix}", rows)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"a\.jsonl.*: damaged after row [\d,]+ \(Truncated compressed stream\)"):
        values(path)
    with pytest.raises(InputError, match="damaged after row"):
        locate_source(str(path)).count()
    path.write_text('{"q": "1", "a": "x"}')
    with pytest.raises(InputError, match=r"damaged after row 0 \("):
        values(path)


def test_a_pattern_is_its_files_in_order_each_by_its_format(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write(tmp_path / "b.jsonl.gz", ROWS[1:])
    write(tmp_path / "part" / "a.json", ROWS[:1])
    write(tmp_path / "other.csv", JSON_ROWS)
    assert values(tmp_path / "**" / "[ab].json*") == ROWS[::-1]
    source = locate_source(str(tmp_path / "**" / "[ab].json*"))
    assert [row.source for row in source.read({"prompt": "q"})] == ["b.jsonl.gz:1", "part/a.json:1"]
    assert source.count() == 2
    before = source.identity(sha256_file)
    write(tmp_path / "part" / "b.json", ROWS[:1])
    assert locate_source(str(tmp_path / "**" / "[ab].json*")).identity(sha256_file) != before
    with pytest.raises(InputError, match=r"\*\.nothing: no file matches; correct the pattern"):
        locate_source(str(tmp_path / "*.nothing"))
    (tmp_path / "notes.md").touch()
    with pytest.raises(InputError, match=r"the format of notes\.md is not supported; convert it to \.jsonl"):
        locate_source(str(tmp_path / "*"))
    write(tmp_path / "[odd].jsonl", ROWS)
    assert values(tmp_path / "[odd].jsonl") == ROWS, "a file of this name is there"


def test_a_fault_in_one_of_several_files_names_it(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", JSON_ROWS)
    (tmp_path / "b.csv").write_text("q,b\n1,x\n")
    with pytest.raises(InputError, match=r"\*\.csv: b\.csv: no column 'a' \(data\.columns\.target\)"):
        values(tmp_path / "*.csv")


def test_the_splits_of_a_folder_are_those_of_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000.jsonl.gz", ROWS[:1])
    write(tmp_path / "data" / "train-00001.jsonl.gz", ROWS[1:])
    write(tmp_path / "data" / "test-00000.jsonl.gz", [{"q": "3", "a": "z"}])
    assert values(tmp_path) == values(tmp_path, split="train") == ROWS
    assert values(tmp_path, split="test") == [{"q": "3", "a": "z"}]
    readme = "---\nconfigs:\n- config_name: small\n  data_files: [{split: dev, path: data/train-00001.jsonl.gz}]\n---\n"
    (tmp_path / "README.md").write_text(readme)
    assert values(tmp_path, subset="small", split="dev") == ROWS[1:]


def test_names_of_classes_in_a_readme(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"q": "1", "a": 1}, {"q": "2", "a": 0}])
    features = "[{name: q, dtype: string}, {name: a, dtype: {class_label: {names: {'0': bad, '1': good}}}}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features: {features}\n---\n")
    assert [row["a"] for row in values(tmp_path)] == ["good", "bad"]


@pytest.mark.parametrize("option", ["subset", "split", "revision"])
def test_options_that_a_source_does_not_use_are_refused(tmp_path: Path, option: str) -> None:
    path, key = write(tmp_path / "a.jsonl"), {"split": "source_split"}.get(option, option)
    for location in (path, tmp_path / "*.jsonl"):
        with pytest.raises(
            InputError, match=rf"^data\.{key}: not used by (a file|files) \(data\.source .*\); remove it"
        ):
            locate_source(str(location), **{option: "x"})
    with pytest.raises(InputError, match=r"^data\.revision: not used by a folder"):
        locate_source(str(tmp_path), revision="x")


def test_all_columns_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": ["1"], "a": ["x"], "c": [1.5]}), path)
    (row,) = locate_source(str(path)).read({}, None)
    assert isinstance(row, Row)
    assert row.values == {"q": "1", "a": "x", "c": 1.5}
