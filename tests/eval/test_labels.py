import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.eval.judges.base import Case, Pair, Winner
from cpo_pipe.eval.labels import COLUMNS, Labels, read_labels

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
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({**row, "who": {"name": "me"}}) + "\n" for row in table))
    else:
        import csv

        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[*COLUMNS, "who"], *([*row, "me"] for row in rows)])
    return path


def pair(prompt: str, a: str, b: str) -> Pair:
    return Pair(Case("e", prompt, f"### {prompt}", "t"), a, b)


def read(path: Path) -> Labels:
    return read_labels(path, sha256_file)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_most_labels_decide_whichever_output_was_first(tmp_path: Path, suffix: str) -> None:
    labels = read(write(tmp_path / f"labels{suffix}", ROWS))
    assert len(labels) == 3
    expected: dict[tuple[str, str, str], Winner | None] = {
        ("p", "x", "y"): "a",
        ("p", "y", "x"): "b",
        ("q", ROWS[3][1], ROWS[3][2]): "b",
        ("q", "v", "u"): "tie",  # one label each
        ("p", "u", "v"): None,
    }
    assert {of: labels.winner(pair(*of)) for of in expected} == expected


def test_labels_are_found_whatever_the_unicode_form_of_their_texts(tmp_path: Path) -> None:
    composed, decomposed = "\u00fc", "u\u0308"  # one sorts after "v", the other before it
    labels = read(
        write(tmp_path / "labels.jsonl", [(composed, decomposed, "v", "a"), (decomposed, "v", composed, "b")])
    )
    assert len(labels) == 1
    for form in (composed, decomposed):
        assert labels.winner(pair(composed, form, "v")) == "a"
        assert labels.winner(pair(decomposed, "v", form)) == "b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file; give the path of a .jsonl, .csv, .parquet file"),
        ("labels.txt", "x", "the suffix '.txt' is none of .jsonl, .csv, .parquet; convert it"),
        ("labels.jsonl", '{"prompt": "p", "output_a": "x", "output_b": "y", "winner": "A"}\n',
         "winner is 'A' in row 1: must be a, b or tie"),
        ("labels.jsonl", '{"prompt": "p", "output_a": "x", "winner": "a"}\n', "row 1 has no output_b"),
        ("labels.jsonl", '{"prompt": 3, "output_a": "x", "output_b": "y", "winner": "a"}\n', "cannot be read ("),
        ("labels.jsonl", "", "cannot be read ("),
        ("labels.csv", "prompt,output_a,winner\np,x,a\n",
         "there is no column output_b: there must be prompt, output_a, output_b, winner"),
        ("labels.parquet", "no parquet", "cannot be read ("),
        ("labels.csv", b"prompt,output_a,output_b,winner\np,x,y,a\np,caf\xe9,y,a\n",
         "output_a in row 2 is not UTF-8; save the file as UTF-8"),
        ("labels.jsonl", b'{"prompt": "p", "output_a": "caf\xe9", "output_b": "y", "winner": "a"}\n',
         "output_a in row 1 is not UTF-8; save the file as UTF-8"),
        ("labels.csv", b"\xff\xfep\0", "contains UTF-16; save it as text in UTF-8"),
        ("labels.csv", b"\xe9,output_a,output_b,winner\np,x,y,a\n", "cannot be read ("),
        ("labels.csv", b"prompt,prompt,output_a,output_b,winner\np,p,x,y,a\n", "cannot be read ("),
        ("labels.csv", b"prompt,output_a,output_b,winner\np,x,y," + b"9" * 5000, "winner is '999999999999...99999"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        read(path)
    assert len(str(error.value)) < 600
    assert str(error.value).startswith(f"evaluate.labels {path}: {message}")
    assert "\n" not in str(error.value)
