"""Hub data sets, whole and streamed; the `datasets` library gives a local one in their place."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.sources.data_sets import HubDataSet
from cpo_pipe.data.sources.rows import Row

ROWS = [{"q": str(n), "a": [{"content": n} if n % 2 else {"text": ["x"]}], "unused": n} for n in range(7)]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each data set that was loaded was streamed."""
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked, load = list[bool](), datasets.load_dataset

    def load_local(name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        assert (name, subset, split, revision) == ("own/set", "main", "test", "c" * 40)
        asked.append(streaming)
        files = str(tmp_path / "set.jsonl")
        return load("json", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return asked


@pytest.mark.parametrize("limit", [None, 1, 3, 9])
def test_a_limit_streams_the_same_rows(asked: list[bool], limit: int | None) -> None:
    source = HubDataSet(name="own/set", subset="main", split="test", commit="c" * 40)
    rows = list(source.read({"prompt": "q"}, ["a"], limit))
    expected = [Row(f"own/set/test:{n + 1}", {"q": row["q"], "a": row["a"]}) for n, row in enumerate(ROWS)]
    assert rows == expected[:limit]
    assert asked == [limit is not None]
    assert source.count(limit) == (limit or 7)
    with pytest.raises(
        InputError, match=r"^data\.source own/set: no column 'z' \(data\.columns\.prompt\); the columns"
    ):
        list(source.read({"prompt": "z"}, (), limit))


def test_nothing_is_streamed_offline(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = HubDataSet(name="own/set", subset="main", split="test", commit="c" * 40)
    assert len(list(source.read({"prompt": "q"}, ["a"], 3))) == 3
    assert asked == [False]


def test_a_failure_in_the_middle_of_a_stream_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"q": "1"}
        raise ConnectionError("the line\nwent dead")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    source = HubDataSet(name="own/set", commit="c" * 40)
    with pytest.raises(InputError, match=r"^data\.source own/set: cannot be read \(the line\)$"):
        list(source.read({"prompt": "q"}, (), 5))
