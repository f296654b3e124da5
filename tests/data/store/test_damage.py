"""Damage to shards, manifests, specs, registrations and cached hashes is found, named and repaired."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from cpo_pipe.data.store import Rows, Store
from tests.support.store import flip, keys, make, manifest_of, row, rows_of, values, write


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-4]), "checksum differs"),
        (flip, "checksum differs"),
        (lambda shard: shard.unlink(), "its file is gone"),
        (
            lambda shard: (flip(shard), manifest_of(shard).write_text("{")),
            "its manifest is unreadable, and its checksum",
        ),
    ],
    ids=["truncated", "one bit", "gone", "with its manifest"],
)
def test_a_damaged_shard_is_named_and_quarantined_and_can_be_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], object], fault: str
) -> None:
    rows = rows_of(tmp_path)
    write(rows, row("a", value=1))
    write(rows, row("b", value=2))
    shard = rows.files()[0]
    harm(shard)
    again = rows_of(tmp_path)
    assert again.missing(keys(("a", "c"), ("b", "c"))).to_pylist() == [{"example_id": "a", "candidate_id": "c"}]
    assert shard.stem in caplog.text
    assert fault in caplog.text
    assert any(path.stem == shard.stem for path in (rows.path / "damaged").iterdir())
    write(again, row("a", value=3))
    assert values(rows_of(tmp_path), "a", "b") == [("a", "c", 3), ("b", "c", 2)]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rows": "3"}', "\x00\x01"])
def test_a_damaged_manifest_is_rebuilt_from_its_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    write(rows_of(tmp_path), row("a", value=1))
    shard = rows_of(tmp_path).files()[0]
    assert isinstance(shard, Path)
    before = json.loads(manifest_of(shard).read_text())
    manifest_of(shard).write_text(content)
    assert values(rows_of(tmp_path), "a") == [("a", "c", 1)]
    assert f"the manifest of shard {shard.stem} was damaged; made again" in caplog.text
    assert json.loads(manifest_of(shard).read_text()) == before
    assert not (shard.parents[1] / "damaged").exists()


def test_shards_of_another_artifact_are_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    one, other = (store.rows("reference-logprobs", {"a": number}) for number in (1, 2))
    for rows, value in (one, 1), (other, 2):
        write(rows, row("a", value=value))
    for folder in ("shards", "manifests"):
        (mine,), (theirs,) = ((rows.path / folder).iterdir() for rows in (one, other))
        mine.rename(tmp_path / "aside")
        theirs.rename(one.path / folder / theirs.name)
        (tmp_path / "aside").rename(other.path / folder / mine.name)
    for rows, owner in (one, other), (other, one):
        fresh = Store(tmp_path).rows("reference-logprobs", rows.spec)
        assert fresh.num_rows() == 0
        assert f"{rows.name}: shard" in caplog.text
        assert f"(it is a shard of {owner.name})" in caplog.text


def test_a_damaged_spec_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(rows_of(tmp_path), row("a"))
    make(Store(tmp_path), "good")
    for artifact in (rows_of(tmp_path), Store(tmp_path).artifact("checkpoints", {"p": 1})):
        (artifact.path / "spec.json").write_text("{")
        assert artifact.num_rows() == 1 if isinstance(artifact, Rows) else artifact.complete()
        assert f"{artifact.name}: spec.json was gone or damaged; made again" in caplog.text
        assert json.loads((artifact.path / "spec.json").read_text()) == artifact.spec


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_dir": 3}', '{"artifacts": ["x"]}'])
def test_a_damaged_registration_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    Store(tmp_path).register_run(tmp_path / "run")
    (path,) = (tmp_path / ".runs").iterdir()
    path.write_text(content)
    store = Store(tmp_path)
    name = store.rows("groups", {"a": 1}).name
    store.register_run(tmp_path / "run")
    assert f"{path} is damaged" in caplog.text
    assert json.loads(path.read_text())["artifacts"] == [name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3, "checksum": ""}', '{"/etc": "ab"}', "\x00\x01"])
def test_damaged_cached_hashes_are_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    os.utime(tmp_path / "model.safetensors")
    time.sleep(0.06)  # a file that was written just now is not cached
    store = Store(tmp_path)
    found = store.hash_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "file-hashes.json").read_text())["files"]
    (tmp_path / "file-hashes.json").write_text(content)
    assert Store(tmp_path).hash_file(tmp_path / "model.safetensors") == found
    assert "file-hashes.json is damaged" in caplog.text
    assert json.loads((tmp_path / "file-hashes.json").read_text())["files"]


READER = """
import sys
from pathlib import Path
from cpo_pipe.data.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(store.rows("reference-logprobs", {"model": "m", "dtype": "float32"}).num_rows())
"""


@pytest.mark.slow
def test_several_readers_may_find_the_same_damage_at_once(tmp_path: Path) -> None:
    for number in range(40):
        rows_of(tmp_path).append(pa.Table.from_pylist([row(f"{number:02d}")]))
    for shard in rows_of(tmp_path).files()[::2]:
        shard.write_bytes(b"damaged")
    command = [sys.executable, "-c", READER, str(tmp_path)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        assert reader.stdout is not None
        reader.stdout.readline()
    answers = [reader.communicate("go\n")[0] for reader in readers]
    assert answers == ["20\n"] * 3
    assert [reader.returncode for reader in readers] == [0] * 3
