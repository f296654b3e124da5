"""Small JSON files: what is as it was written is read, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.store.records import (
    artifact_manifest,
    read_record,
    registration,
    run_record,
    shard_manifest,
    with_checksum,
)

DAMAGED = [b"", b"{", b'{"rows": 1', b"null", b"3", b"[]", b'"text"', bytes(range(256)), b"\xff\xfe{}", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_what_holds_no_object_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    for read in (read_record, shard_manifest, artifact_manifest, registration):
        assert read(path) is None
    assert run_record(tmp_path) is None


def test_what_is_gone_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_record(tmp_path / "absent") is None
    assert read_record(tmp_path / "file/below") is None


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (shard_manifest, {"rows": "3", "bytes": 5, "sha256": "ab"}),
        (shard_manifest, {"rows": 3, "bytes": 5}),
        (artifact_manifest, {}),
        (artifact_manifest, {"files": {}}),
        (artifact_manifest, {"files": ["a"]}),
        (artifact_manifest, {"files": {"a": 1}}),
        (registration, {"run_dir": "x", "host": "h"}),
        (registration, {"run_dir": 1, "host": "h", "artifacts": []}),
        (registration, {"run_dir": "x", "host": "h", "artifacts": "a/b"}),
        (registration, {"run_dir": "x", "host": "h", "artifacts": [1]}),
        (lambda path: run_record(path.parent), {}),
        (lambda path: run_record(path.parent), {"stages": []}),
        (lambda path: run_record(path.parent), {"stages": {"train": 3}}),
        (lambda path: run_record(path.parent), {"stages": {"train": {"seconds": "3"}}}),
        (lambda path: run_record(path.parent), {"stages": {}, "report": []}),
    ],
)
def test_another_form_is_damage(tmp_path: Path, read: Any, content: dict[str, Any]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    assert read(path) is None


def test_a_changed_value_is_damage_where_a_checksum_is(tmp_path: Path) -> None:
    record = {"fingerprint": "ab", "loss": 0.1, "by step": {2: "b", 10: "a"}, "pair": (1, float("inf"))}
    path = tmp_path / "manifest.json"
    text = json.dumps(with_checksum(record), indent=2)
    path.write_text(text)
    read = read_record(path)
    assert read is not None
    assert read["fingerprint"] == "ab"
    path.write_text(text.replace('"ab"', '"ac"'))
    assert read_record(path) is None
