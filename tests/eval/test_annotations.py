import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.eval.annotations import COLUMNS, Annotations, read_annotations
from cpo_pipe.eval.judges.base import Case, Pair, Winner

ROWS = [
    ("p", "x", "y", "a"),
    ("p", "y", "x", "b"),  # the same verdict, the other way round
    ("p", "x", "y", "b"),
    ("q", "2024-01-01", 'a "quoted", line\nand another', "b"),
    ("q", "u", "v", "a"),
    ("q", "u", "v", "tie"),
]


def write(path: Path, rows: list[Any]) -> Path:
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table).append_column("who", pa.array(["me"] * len(rows))), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({**row, "who": {"name": "me"}}) + "\n" for row in table))
    else:
        import csv

        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[*COLUMNS, "who"], *([*row, "me"] for row in rows)])
    return path


def pair(prompt: str, a: str, b: str) -> Pair:
    return Pair(Case("e", prompt, f"### {prompt}", "t"), a, b)


def read(path: Path) -> Annotations:
    return read_annotations(str(path), sha256_file)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
def test_most_annotations_decide_whichever_output_was_first(tmp_path: Path, suffix: str) -> None:
    annotations = read(write(tmp_path / f"annotations{suffix}", ROWS))
    assert len(annotations) == 3
    expected: dict[tuple[str, str, str], Winner | None] = {
        ("p", "x", "y"): "a",
        ("p", "y", "x"): "b",
        ("q", ROWS[3][1], ROWS[3][2]): "b",
        ("q", "v", "u"): "tie",  # one label each
        ("p", "u", "v"): None,
    }
    assert {of: annotations.winner(pair(*of)) for of in expected} == expected


def test_annotations_are_found_whatever_the_unicode_form_of_their_texts(tmp_path: Path) -> None:
    composed, decomposed = "\u00fc", "u\u0308"  # one sorts after "v", the other before it
    annotations = read(
        write(tmp_path / "annotations.jsonl", [(composed, decomposed, "v", "a"), (decomposed, "v", composed, "b")])
    )
    assert len(annotations) == 1
    for form in (composed, decomposed):
        assert annotations.winner(pair(composed, form, "v")) == "a"
        assert annotations.winner(pair(decomposed, "v", form)) == "b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file; give the path of a file in one of the formats .jsonl, .json, .csv, "),
        ("annotations.txt", "x", "a .txt file holds articles, not pairs; give a file of another format"),
        ("annotations.xlsx", "x", "suffix '.xlsx' is not supported; convert it to one of .jsonl, "),
        ("annotations.jsonl", '\n{"prompt": "p", "output_a": "x", "output_b": "y", "winner": "A"}\n',
         "annotations.jsonl:2: not a winner (column winner is 'A', not a, b or tie); correct the row"),
        ("annotations.jsonl", '{"prompt": "p", "output_a": "x", "winner": "a"}\n',
         "annotations.jsonl:1: missing field (column output_b); correct the row"),
        ("annotations.jsonl", '{"prompt": 3, "output_a": "x", "output_b": "y", "winner": "a"}\n',
         "annotations.jsonl:1: not text (column prompt has type int: 3); correct the row"),
        ("annotations.jsonl", "{oops", "annotations.jsonl:1: not JSON ({oops); correct the row"),
        ("annotations.jsonl", "", "has no rows; name a source that has some"),
        ("annotations.csv", "prompt,output_a,winner\np,x,a\n",
         "no column 'output_b'; the columns there are prompt, output_a, winner; rename the ones that are meant"),
        ("annotations.parquet", "no parquet", "not a Parquet file ("),
        ("annotations.csv", b"prompt,output_a,output_b,winner\np,x,y,a\np,caf\xe9,y,a\n",
         "annotations.csv:3: not UTF-8 (column output_a is caf"),
        ("annotations.jsonl", b'{"prompt": "p", "output_a": "caf\xe9", "output_b": "y", "winner": "a"}\n',
         "annotations.jsonl:1: not UTF-8 ("),
        ("annotations.csv", b"\xff\xfep\0", "contains UTF-16; save it as text in UTF-8"),
        ("annotations.csv", b"\xe9,output_a,output_b,winner\np,x,y,a\n", "no column 'prompt'; the columns there are "),
        ("annotations.csv", b"prompt,prompt,output_a,output_b,winner\np,p,x,y,a\n", "has two columns named 'prompt'"),
        ("annotations.csv", b"prompt,output_a,output_b,winner\np,x,y," + b"9" * 5000,
         "annotations.csv:2: not a winner (column winner is '999999999999...9999"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        read(path)
    assert len(str(error.value)) < 600
    assert str(error.value).startswith(f"evaluate.annotations {path}: {message}")
    assert "\n" not in str(error.value)
