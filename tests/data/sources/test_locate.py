"""Expected labels and reasons are counted by hand from the bytes written in each test."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from cpo_pipe.data import fingerprint
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import FileHashes, sha256_file
from cpo_pipe.data.sources.data_sets import HubDataSet
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Refusal, Row
from tests.support.damage import rot

PAIR = {"prompt": "q", "target": "a"}
WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "wikitext2-test.txt"


def read(path: Path, required=PAIR, **kwargs) -> list[Row | Refusal]:
    return list(locate_source(str(path)).read(required, **kwargs))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_jsonl_labels_rows_by_line_and_refuses_bad_lines(tmp_path):
    lines = [b'\xef\xbb\xbf{"q": "1", "a": "x"}', b"", b"[1]", b"{oops", b'{"q": "\xff", "a": "y"}', b'{"q": "5"}']
    rows = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert [(row.source, getattr(row, "reason", None)) for row in rows] == [
        ("a.jsonl:1", None), ("a.jsonl:3", "not an object"), ("a.jsonl:4", "not JSON"),
        ("a.jsonl:5", "not UTF-8"), ("a.jsonl:6", None),
    ]  # fmt: skip
    assert rows[0].values == {"q": "1", "a": "x"}
    assert rows[3].detail == '{"q": "\\xff", "a": "y"}\n'


def test_jsonl_line_separators_inside_a_text_do_not_end_the_row(tmp_path):
    line = json.dumps({"q": "one\u2028two\x85three", "a": "x"}, ensure_ascii=False)
    assert read(write(tmp_path / "a.jsonl", line.encode()))[0].values["q"] == "one\u2028two\x85three"


def test_jsonl_column_in_no_row_is_one_error_with_the_columns_there(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"question": "1", "a": "x"}\n{"question": "2", "b": "x"}\n')
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == (
        f"data.source {path}: no column 'q' (data.columns.prompt); the columns there are question, a, b; "
        "set data.columns.prompt to the one that is meant"
    )


def test_jsonl_of_empty_objects_lacks_its_columns(tmp_path):
    with pytest.raises(InputError, match="no column 'q'"):
        read(write(tmp_path / "a.jsonl", b"{}\n"))


def test_csv_labels_a_row_by_its_first_line(tmp_path):
    content = b'q,a\n"one\ntwo",x\n\xff,y\n3\n4,z,more\n"bad"quote,z\n5,"v"\n'
    rows = read(write(tmp_path / "a.csv", content))
    assert [row.source for row in rows] == ["a.csv:2", "a.csv:4", "a.csv:5", "a.csv:6", "a.csv:7", "a.csv:8"]
    assert rows[0].values == {"q": "one\ntwo", "a": "x"}
    assert rows[1].values == {"q": "\udcff", "a": "y"}
    assert rows[2].values == {"q": "3"}
    assert (rows[3].reason, rows[3].detail) == ("more fields than columns", "4,z,more")
    assert rows[4].reason == "not CSV"
    assert rows[5].values == {"q": "5", "a": "v"}


def test_csv_quote_that_swallows_the_rest_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"the quote opened at a\.csv:3 is not closed"):
        read(write(tmp_path / "a.csv", b'q,a\n1,x\n"2,y\n3,z\n'))


def test_csv_and_parquet_without_a_mapped_column_fail_before_the_first_row(tmp_path):
    csv_file = write(tmp_path / "a.csv", b"q,b\n1,x\n")
    pq.write_table(pa.table({"q": ["1"], "b": ["x"]}), tmp_path / "a.parquet")
    for path in (csv_file, tmp_path / "a.parquet"):
        with pytest.raises(InputError) as error:
            next(locate_source(str(path)).read(PAIR))
        assert f"{path}: no column 'a' (data.columns.target); the columns there are q, b; set" in str(error.value)


def test_parquet_reads_mapped_columns_and_bytes_that_are_not_utf8(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xff"]).buffers())
    pq.write_table(pa.table({"q": ["1", "2"], "a": bad, "unused": [1, 2], "c": [None, "k"]}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", optional=["c", "absent"])
    assert [(row.source, row.values) for row in rows] == [
        ("a.parquet:1", {"q": "1", "a": "x", "c": None}),
        ("a.parquet:2", {"q": "2", "a": "\udcff", "c": "k"}),
    ]


def test_parquet_that_is_none_is_an_error(tmp_path):
    with pytest.raises(InputError, match="not a Parquet file"):
        read(write(tmp_path / "a.parquet", b"nothing of the kind"))


def bad_text(size):
    """A column of `size` texts, the last one not UTF-8."""
    return pa.Array.from_buffers(pa.string(), size, pa.array([b"x"] * (size - 1) + [b"\xff"]).buffers())


def test_parquet_values_that_python_cannot_hold_are_refused_by_row_and_column(tmp_path):
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), bad_text(2))
    years = pa.Array.from_buffers(pa.timestamp("ms"), 2, pa.array([0, 10**15]).buffers())
    for column, reason in ((lists, "not UTF-8"), (years, "not text")):
        pq.write_table(pa.table({"q": ["1", "2"], "a": column}), tmp_path / "a.parquet")
        good, bad = read(tmp_path / "a.parquet")
        assert isinstance(good, Row)
        assert bad == Refusal("a.parquet:2", reason, "column a")


def test_a_damaged_page_is_named_with_the_rows_before_it(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"q": [f"question {number}" for number in range(4000)], "a": ["x"] * 4000}
    pq.write_table(pa.table(rows), path, compression="zstd", row_group_size=2000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start + 40 : start + 400] = b"\xff" * 360
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: damaged after row [12],\d{3} \(.*\); write the file again$"):
        read(path)


def test_a_parquet_column_whose_name_is_not_utf8_is_an_error(tmp_path):
    pq.write_table(pa.table({"QQQQ": ["1"], "a": ["x"]}), tmp_path / "a.parquet", store_schema=False)
    path = write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes().replace(b"QQQQ", b"\xff\xff\xff\xff"))
    with pytest.raises(InputError, match=r"b\.parquet: not a Parquet file \("):
        read(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'"q', "the header is not CSV (unexpected end of data); correct line 1"),
        (b'"q"x,a\n', "the header is not CSV ("),
        (b"q,a,q\n1,2,3\n", "has two columns named 'q'; rename or remove one"),
        (b",,\n1,2,3\n", "no column 'q' (data.columns.prompt), 'a' (data.columns.target)"),
        (b"\n1,2\n", "no column 'q' (data.columns.prompt), 'a' (data.columns.target); the columns there are none"),
    ],
)
def test_a_bad_csv_header_is_one_line(tmp_path, header, message):
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "a.csv", header))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_csv_field_of_a_megabyte_and_a_nul_are_text(tmp_path):
    (row,) = read(write(tmp_path / "a.csv", b"q,a\n" + b"x" * (1 << 20) + b",b\0c\n"))
    assert row.values == {"q": "x" * (1 << 20), "a": "b\0c"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_other_content_than_text_is_named(tmp_path, suffix):
    line = '{"q": "1", "a": "x"}\n'
    contents = {"gzip": gzip.compress(line.encode()), "UTF-16": line.encode("utf-16"), "Parquet": b"PAR1"}
    for kind, content in contents.items():
        path = write(tmp_path / f"a{suffix}", content)
        with pytest.raises(InputError) as error:
            read(path, {"target": "text"} if suffix == ".txt" else PAIR)
        fix = f"name it a{suffix}.gz" if kind == "gzip" else "save it as text in UTF-8"
        assert str(error.value) == f"data.source {path}: contains {kind}; {fix}"


def test_pipes_folders_and_dangling_links_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nothing")
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(InputError, match="no such file"):
            locate_source(str(tmp_path / name))


def test_text_file_is_one_article(tmp_path):
    rows = read(write(tmp_path / "a.txt", b"\nOne.\n\n= Two =\n\n = = Three = = \n\n"), {"target": "text"})
    assert rows == [Row("a.txt:1", {"text": "One.\n\n= Two =\n\n = = Three = ="})]


def test_wikitext_titles_begin_articles_only_between_blank_lines(tmp_path):
    first = "= First = \n \n text \n = 1 after text = \n \n = 2 before text = \n more \n = = Part = ="
    second = "= Second = \n \n x"
    rows = read(write(tmp_path / "a.txt", f" \n {first} \n \n {second} \n".encode()), {"target": "text"})
    assert rows == [Row("a.txt:2", {"text": first}), Row("a.txt:11", {"text": second})]


def test_article_that_is_not_utf8_is_refused_alone(tmp_path):
    rows = read(write(tmp_path / "a.txt", b" = A = \n \n \xff \n \n = B = \n \n ok \n"), {"target": "text"})
    assert [(row.source, getattr(row, "reason", None)) for row in rows] == [("a.txt:1", "not UTF-8"), ("a.txt:5", None)]


@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs ../shared/data, which is not part of the project")
def test_wikitext2_has_the_60_articles_of_its_test_set():
    source = locate_source(str(WIKITEXT))
    assert source.count() == 60
    assert next(source.read({"target": "text"})).values["text"].startswith("= Robert <unk> =")


def test_text_file_read_as_pairs_names_the_preset(tmp_path):
    with pytest.raises(InputError, match=r"a \.txt file holds articles, not pairs; set data\.preset: text"):
        read(write(tmp_path / "a.txt", b"One."))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"\n \n"), ("a.csv", b""), ("b.csv", b"q,a\n"), ("a.txt", b" \n")]
)
def test_no_rows_is_an_error(tmp_path, name, content):
    required = {"target": "text"} if name.endswith(".txt") else PAIR
    with pytest.raises(InputError, match="has no rows"):
        read(write(tmp_path / name, content), required)


def test_limit_and_count(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"q": "1", "a": "x"}\n\n' * 5)
    assert [row.source for row in read(path, limit=2)] == ["a.jsonl:1", "a.jsonl:3"]
    assert locate_source(str(path)).count() == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.jsonl", "no such file; give the path"), ("a b", "no such file or folder, and not the name"),
     ("a.xlsx", "suffix '.xlsx' is not supported; convert it to one of .jsonl, .json, .csv, .tsv, .txt, ")],
)  # fmt: skip
def test_sources_that_are_not_there(tmp_path, name, message):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(InputError) as error:
        locate_source(str(tmp_path / name))
    assert message in str(error.value)


@pytest.mark.parametrize("rows", [50, 40], ids=["more rows", "as many bytes"])
def test_a_replaced_file_of_a_folder_is_read_whatever_its_time_says(tmp_path, monkeypatch, rows):
    """As `tar`, `rsync -t` and reproducible builds leave it: the modification time is that of the old file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()

    def write_rows(text: str, count: int) -> None:
        path = write(
            folder / "train.jsonl", b"".join(b'{"q": "%d", "a": "%s"}\n' % (n, text.encode()) for n in range(count))
        )
        os.utime(path, (1_000_000_000, 1_000_000_000))

    hash_file = FileHashes(tmp_path / "hashes.json", Path.write_bytes)
    seen = []
    for text, count in (("old", 40), ("new", rows)):
        write_rows(text, count)
        source = locate_source(str(folder))
        assert [row.values["a"] for row in source.read(PAIR)] == [text] * count
        assert source.count() == count
        seen.append(source.identity(hash_file)["files"])
    assert seen[1] == {"train.jsonl": sha256_file(folder / "train.jsonl")} != seen[0]


def test_a_damaged_source_is_refused_before_it_is_read_under_its_old_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "UNCACHED_BYTES", 0)  # as of a large file
    path = write(tmp_path / "a.jsonl", b'{"q": "1", "a": "x"}')
    intact = locate_source(str(path)).identity(sha256_file)
    rot(path, tmp_path)
    source, cached = locate_source(str(path)), FileHashes(tmp_path / "file-hashes.json", Path.write_bytes)
    assert source.identity(cached) == intact
    with pytest.raises(RunError, match=r"a\.jsonl: damaged"):
        source.check(intact)
    assert source.identity(cached) == source.identity(sha256_file) != intact


def test_folder_is_read_as_a_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"q": ["1", "2"], "a": ["x", None]}), folder / "train.parquet")
    source = locate_source(str(folder))
    assert list(source.read(PAIR)) == [
        Row("train.parquet:1", {"q": "1", "a": "x"}),
        Row("train.parquet:2", {"q": "2", "a": None}),
    ]
    assert source.count() == 2
    with pytest.raises(InputError, match="no column 'z' "):
        next(source.read({"prompt": "z"}))
    with pytest.raises(InputError, match="has no split 'absent'; choose from train"):
        locate_source(str(folder), split="absent").count()
    with pytest.raises(InputError, match=r"not readable as a data set \(BuilderConfig 'sub' not found"):
        locate_source(str(folder), subset="sub").count()
    assert source.identity(sha256_file)["files"] == {"train.parquet": sha256_file(folder / "train.parquet")}


def test_a_bad_row_of_a_folder_is_one_refused_row(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"q": "1", "a": "x"}\n{"q": oops}\n')
    good, bad = locate_source(str(folder)).read(PAIR)
    assert good.values == {"q": "1", "a": "x"}
    assert (bad.source, bad.reason) == ("train.jsonl:2", "not JSON")


def test_names_of_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"q": Value("string"), "kind": ClassLabel(names=["good", "bad"]), "number": Value("int64")})
    rows = {"q": ["1", "2", "3", "4"], "kind": [0, 1, -1, None], "number": [0, 1, 0, 1]}
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.parquet"
    Dataset.from_dict(rows, features).to_parquet(file)
    for source in (locate_source(str(file)), locate_source(str(tmp_path / "set"))):
        found = [row.values for row in source.read({"prompt": "q"}, ["kind", "number"])]
        assert [values["kind"] for values in found] == ["good", "bad", None, None]
        assert [values["number"] for values in found] == [0, 1, 0, 1]


def test_folders_of_save_to_disk(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Json, List, Value

    features = Features({"q": Value("string"), "a": List(Json()), "kind": ClassLabel(names=["good", "bad"])})
    rows = {"q": ["1"], "a": [[{"role": "user", "content": None}, {"content": ["x"]}]], "kind": [1]}
    one = Dataset.from_dict(rows, features)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.map(lambda row: {"q": "2"})}).save_to_disk(tmp_path / "two")
    for folder, split, q in (("one", None, "1"), ("two", None, "1"), ("two", "test", "2")):
        source = locate_source(str(tmp_path / folder), split=split)
        assert list(source.read(PAIR, ["kind"])) == [Row(f"{folder}:1", {"q": q, "a": rows["a"][0], "kind": "bad"})]
        assert source.count() == 1
    assert source.identity(sha256_file) != locate_source(str(tmp_path / "two")).identity(sha256_file)
    with pytest.raises(InputError, match="has no split 'dev'; choose from train, test"):
        locate_source(str(tmp_path / "two"), split="dev").count()
    with pytest.raises(InputError, match=r"^data\.source_split: not used by a data set without splits \(data\.source "):
        locate_source(str(tmp_path / "one"), split="train")


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["1"], ["x"], ["y"], ["z"]], names=["q", "a", "b", "b"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].values == {"q": "1", "a": "x"}, "two that are not read do no harm"
    with pytest.raises(InputError) as error:
        read(tmp_path / "a.parquet", {"prompt": "q", "target": "b"})
    assert str(error.value) == (
        f"data.source {tmp_path / 'a.parquet'}: has two columns named 'b'; rename or remove one"
    )


def test_identity_is_the_content_not_the_name(tmp_path):
    one, same, other = (write(tmp_path / f"{n}.jsonl", c) for n, c in (("1", b"{}"), ("2", b"{}"), ("3", b"[]")))
    identities = [locate_source(str(path)).identity(sha256_file) for path in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]


def test_hub_data_set_is_pinned_to_a_commit_also_offline(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", offline)
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(InputError, match=r"the hub gave no such data set \(no network\)"):
        locate_source("owner/set")
    assert locate_source("owner/set", revision=commit).commit == commit
    refs = tmp_path / "datasets--owner--set" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    source = locate_source("owner/set", subset="main", split="test")
    assert source == HubDataSet(name="owner/set", subset="main", split="test", commit=commit)
    assert source.identity(sha256_file) == {"kind": "hub", "commit": commit, "subset": "main", "split": "test"}


def test_the_commit_of_a_streamed_data_set_is_known_offline(tmp_path, monkeypatch):
    """It leaves nothing in the hub's own cache."""

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, commit in (("v1", "1" * 40), (None, "2" * 40), (None, "3" * 40)):
        monkeypatch.setattr(HfApi, "dataset_info", lambda *_, sha=commit, **__: type("Info", (), {"sha": sha}))
        assert locate_source("owner/set", revision=revision).commit == commit
    monkeypatch.setattr(HfApi, "dataset_info", offline)
    assert locate_source("owner/set").commit == "3" * 40
    assert locate_source("owner/set", revision="v1").commit == "1" * 40
    with pytest.raises(InputError, match=r"the hub gave no such data set \(no network\)"):
        locate_source("owner/other")
