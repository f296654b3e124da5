"""A store on an object server: real HTTP, through s3fs, with nothing but the environment saying where it is."""

import importlib
import json
import pickle
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.data.store import Rows, Store, atomic, shards
from tests.support.store import SPEC, flip, keys, make, row, values

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")

ROOT = "s3://bucket/some/store"


@pytest.fixture(autouse=True)
def s3(object_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What users set, and an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "cache"))
    importlib.import_module("s3fs").S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])
    return client


def rows_of(root: str = ROOT) -> Rows:
    return Store(root).rows("reference-logprobs", SPEC)


def append(rows: Rows, *content: dict[str, Any]) -> None:
    rows.append(pa.Table.from_pylist(list(content)))


def objects(s3: Any, part: str) -> list[str]:
    found = s3.list_objects_v2(Bucket="bucket").get("Contents", [])
    return [item["Key"] for item in found if part in item["Key"]]


def test_rows_are_there_for_the_next_store(s3: Any, tmp_path: Path) -> None:
    rows = rows_of()
    assert rows.num_rows() == 0
    with rows.lock(), rows.writer() as writer:
        writer.add([row("b", "1", 1), row("a", "2", 2)])
    append(rows, row("a", "1", 3), row("b", "1", 9))
    for reader in (rows, rows_of(), pickle.loads(pickle.dumps(rows))):
        assert values(reader, "a", "b") == [("a", "1", 3), ("a", "2", 2), ("b", "1", 1)]
        assert reader.missing(keys(("a", "3"), ("a", "1"), ("c", "1"))).to_pylist() == [
            {"example_id": "a", "candidate_id": "3"},
            {"example_id": "c", "candidate_id": "1"},
        ]
        assert [table.num_rows for table in reader.batches(["a", "b"], size=1)] == [2, 1]
    (spec,) = objects(s3, "spec.json")
    assert spec == f"some/store/reference-logprobs/{rows.path.name}/spec.json"
    assert [str(path) for path in rows.files()] == [f"s3://bucket/{name}" for name in objects(s3, "/shards/")]
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_what_another_process_writes_is_seen() -> None:
    rows = rows_of()
    append(rows, row("here"))
    assert rows.num_rows() == 1
    script = (
        "from cpo_pipe.data.store import Store; import pyarrow as pa\n"
        f"rows = Store({ROOT!r}).rows('reference-logprobs', {SPEC!r})\n"
        "print(rows.read(['here'])['example_id'].to_pylist())\n"
        f"rows.append(pa.Table.from_pylist([{row('there')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "['here']\n"
    assert rows.num_rows() == 2


@pytest.mark.slow
def test_two_writers_at_once_do_no_harm() -> None:
    """There is no lock between machines: both make the same rows."""
    script = (
        "import sys; from cpo_pipe.data.store import Store; import pyarrow as pa\n"
        f"rows = Store({ROOT!r}).rows('reference-logprobs', {SPEC!r})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(10):\n"
        f"    rows.append(pa.Table.from_pylist([{row('x')!r} | dict(example_id=f'{{number}}', logprob=float(number))]))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate()
        assert process.returncode == 0
    rows = rows_of()
    assert len(rows.files()) == 20
    assert rows.num_rows() == 10
    assert values(rows, *map(str, range(10))) == [(str(number), "c", float(number)) for number in range(10)]


@pytest.mark.parametrize("harm", ["one bit", "gone"])
def test_a_damaged_shard_is_set_aside(s3: Any, caplog: pytest.LogCaptureFixture, harm: str, tmp_path: Path) -> None:
    rows = rows_of()
    append(rows, row("a", value=1))
    append(rows, row("b", value=2))
    shard = objects(s3, "/shards/")[0]
    if harm == "gone":
        s3.delete_object(Bucket="bucket", Key=shard)
    else:
        s3.download_file("bucket", shard, str(tmp_path / "shard"))
        flip(tmp_path / "shard")
        s3.upload_file(str(tmp_path / "shard"), "bucket", shard)
    again = rows_of()
    assert again.missing(keys(("a", "c"), ("b", "c"))).to_pylist() == [{"example_id": "a", "candidate_id": "c"}]
    assert "is damaged" in caplog.text
    assert len(objects(s3, "/damaged/")) == (1 if harm == "gone" else 2)
    append(again, row("a", value=3))
    assert values(rows_of(), "a", "b") == [("a", "c", 3), ("b", "c", 2)]


@pytest.mark.slow
def test_small_shards_are_merged(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)
    rows, names = rows_of(), [f"{number:02d}" for number in range(20)]
    for name in names:
        append(rows, row(name, value=float(name)))
    reader = rows_of()
    assert reader.num_rows() == 20
    with rows.lock():
        pass
    content = [(name, "c", float(name)) for name in names]
    assert values(rows_of(), *names) == content
    assert reader.read(names, refresh=False)["example_id"].to_pylist() == names
    assert len(objects(s3, "/shards/")) == len(objects(s3, "/manifests/")) == 5


# ── artifacts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "other") -> Store:
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / name))
    return Store(ROOT)


def content_of(store: Store) -> str:
    artifact = store.artifact("checkpoints", {"p": 1})
    assert artifact.complete()
    assert artifact.manifest["max_steps"] == 3
    return (artifact.path / "weights").read_text()


def test_an_artifact_is_made_here_and_found_there(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Store(ROOT)
    assert not store.artifact("checkpoints", {"p": 1}).complete()
    make(store, "new")
    assert content_of(store) == "new"
    assert {name.rpartition("/")[2] for name in objects(s3, "checkpoints/")} == {
        "manifest.json",
        "spec.json",
        "weights",
    }
    other = another_machine(monkeypatch, tmp_path)
    assert content_of(other) == "new"
    artifact = other.artifact("checkpoints", {"p": 1})
    assert artifact.path.is_relative_to(tmp_path / "other")
    assert artifact.in_progress.is_relative_to(tmp_path / "other")
    downloaded = sha256_file(artifact.path / "weights")
    (artifact.path / "weights").write_text("harmed")  # a copy that is damaged is downloaded again
    assert content_of(other) == "new"
    assert sha256_file(artifact.path / "weights") == downloaded


def test_an_artifact_that_was_not_uploaded_whole_is_not_there(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", killed_at_the_remote_manifest)
        with pytest.raises(KeyboardInterrupt):
            make(Store(ROOT), "new")
    assert not Store(ROOT).artifact("checkpoints", {"p": 1}).complete()
    artifact = Store(ROOT).artifact("checkpoints", {"p": 1})
    with artifact.lock():
        assert artifact.complete(), "the next holder of the lock uploads what is made instead of making it again"
    assert content_of(another_machine(monkeypatch, tmp_path)) == "new"


def killed_at_the_remote_manifest(path: Any, content: bytes) -> None:
    if not isinstance(path, Path):
        raise KeyboardInterrupt
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("harmed", ["weights", "manifest.json"])
def test_a_damaged_artifact_is_made_again(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, harmed: str
) -> None:
    make(Store(ROOT), "good")
    (key,) = objects(s3, harmed)
    s3.put_object(Bucket="bucket", Key=key, Body=b"bad")
    other = another_machine(monkeypatch, tmp_path)
    assert not other.artifact("checkpoints", {"p": 1}).complete()
    assert harmed in caplog.text
    make(other, "good")
    assert content_of(other) == "good"
    assert content_of(another_machine(monkeypatch, tmp_path, "third")) == "good"


def test_a_manifest_does_not_decide_where_to_write(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Store(ROOT), "good")
    (key,) = objects(s3, "manifest.json")
    s3.put_object(Bucket="bucket", Key=key, Body=json.dumps({"files": {"../../escaped": "0"}}).encode())
    s3.put_object(Bucket="bucket", Key="some/store/escaped", Body=b"bad")
    assert not another_machine(monkeypatch, tmp_path).artifact("checkpoints", {"p": 1}).complete()
    assert not list(tmp_path.rglob("escaped"))


def test_runs_are_registered(s3: Any, tmp_path: Path) -> None:
    store = Store(ROOT)
    name = store.rows("groups", {"a": 1}).name
    store.register_run(tmp_path / "run")
    (key,) = objects(s3, ".runs/")
    content = json.loads(s3.get_object(Bucket="bucket", Key=key)["Body"].read())
    assert content == {"run_dir": str(tmp_path / "run"), "host": socket.gethostname(), "artifacts": [name]}


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nope://bucket/store", r"--store nope://bucket/store: no such protocol as nope"),
        ("s3://", r"--store s3://: names no bucket"),
        ("s3://absent/store", r"--store s3://absent/store: no such bucket"),
        ("gs://user:word@bucket/store", r"--store gs://bucket/store: a package is missing for gs://; .*gcsfs"),
    ],
)
def test_a_root_that_cannot_be_is_one_line(root: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Store(root)
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_missing_package_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"pip install 'cpo-pipe\[s3\]'"):
        Store("s3://bucket/store")


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:word@127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InputError, match=r"cannot be reached .*AWS_ENDPOINT_URL") as caught:
        Store(ROOT)
    assert "word" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_permission_is_one_line(object_server: str) -> None:
    rows = rows_of()
    check_permissions(object_server, after=0)  # nobody has any
    try:
        with pytest.raises(InputError, match="no permission"):
            append(rows, row("a"))
        with pytest.raises(InputError, match="no permission") as caught:
            Store(ROOT)
        assert "secret" not in str(caught.value)
    finally:
        check_permissions(object_server, after=1e9)


def check_permissions(server: str, after: float) -> None:
    """Make the server look at who asks once it has answered this many requests."""
    headers = {"Content-Type": "text/plain"}
    url = f"{server}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(url, str(after).encode(), headers)).close()


def test_a_store_may_be_a_file_url(tmp_path: Path) -> None:
    rows = rows_of(f"file://{tmp_path}/store")
    append(rows, row("a"))
    assert isinstance(rows.path, Path)
    assert rows.files()[0].is_relative_to(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
