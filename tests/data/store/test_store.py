"""The store: rows are the unit of reuse, shards are atomic, damage is found, two processes do not collide."""

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import content_hash, model_fingerprint, row_seed
from cpo_pipe.data.store import Rows, Store
from tests.support.store import SPEC, Crash, crash_at, flip, keys, make, row, rows_of, values


def write(rows: Rows, *content: dict[str, Any]) -> None:
    with rows.lock(), rows.writer() as writer:
        writer.add(content)


# ── hashes ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hash_is_the_spec_and_not_its_spelling() -> None:
    assert content_hash({"a": 1, "b": [2, "x"]}) == content_hash({"b": [2, "x"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash({"a": 1}) != content_hash({"a": 1, "b": None})


@given(st.integers(0, 2**31), st.text())
def test_seeds_leave_room_for_samples_and_stay_below_the_limit(seed: int, example: str) -> None:
    first = row_seed(seed, example)
    assert first % (1 << 16) == 0
    assert 0 <= first < 2**61
    assert first == row_seed(seed, example)
    assert first != row_seed(seed + 1, example)


def test_a_model_is_its_content(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def fingerprint(name: str, weights: bytes, **config: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        (folder / "model.safetensors").write_bytes(weights)
        return model_fingerprint(folder, store.hash_file)

    one = fingerprint("one", b"w" * 10)
    assert fingerprint("other-name", b"w" * 10, transformers_version="9") == one
    assert fingerprint("one", b"v" * 10) != one  # the same name, other weights
    assert fingerprint("one", b"w" * 10, rope_theta=5) != one
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        model_fingerprint(tmp_path / "one", store.hash_file)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reads_in_the_order_asked_for_and_only_what_was_asked_for(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    write(rows, row("b", "1", 1), row("a", "2", 2))
    write(rows, row("c", "3", 3), row("a", "1", 4))
    assert values(rows, "a", "c", "b") == [("a", "1", 4), ("a", "2", 2), ("c", "3", 3), ("b", "1", 1)]
    assert values(rows, "b", "nowhere") == [("b", "1", 1)]
    assert [t.num_rows for t in rows.batches(["a", "b", "c"], size=2)] == [3, 1]


def test_contains_answers_for_each_key_in_turn(tmp_path: Path) -> None:
    rows, reader = rows_of(tmp_path), rows_of(tmp_path)
    asked = keys(("b", "1"), ("a", "2"), ("a", "1"), ("b", "1"))
    assert reader.contains(asked).tolist() == [False] * 4
    write(rows, row("a", "1"))
    assert reader.contains(asked).tolist() == [False, False, True, False]
    write(rows, row("b", "1"))
    assert reader.contains(asked, refresh=False).tolist() == [False, False, True, False]
    assert reader.read(["b"], refresh=False).num_rows == 0
    assert reader.contains(asked).tolist() == [True, False, True, True]
    assert reader.contains(asked.slice(0, 0)).tolist() == []


def test_which_samples_are_there(tmp_path: Path) -> None:
    rows = Store(tmp_path).rows("generations", {"a": 1})
    assert rows.has_samples(["a"], 2).tolist() == [[False, False]]
    columns = {"text": "t", "token_ids": [1], "finish_reason": "stop", "seed": 0, "engine": "e"}
    places = [("a", 0), ("a", 2), ("b", 1), ("a", 700)]
    with rows.writer() as writer:
        writer.add([{"example_id": name, "sample_index": k, **columns} for name, k in places])
    expected = [[False, True, False], [False] * 3, [True, False, True], [False, True, False]]
    asked = ["b", "nowhere", "a", "b"]
    for form in (asked, pa.array(asked), pa.chunked_array([asked[:1], asked[1:]])):
        found = rows.has_samples(form, 3)
        assert found.shape == (4, 3)
        assert found.tolist() == expected
    assert rows.has_samples([], 3).shape == (0, 3)
    assert rows.read(["a"])["sample_index"].to_pylist() == [0, 2, 700]


def test_rows_travel_without_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = rows_of(Path("store"))
    write(rows, *[row(f"{number:04d}") for number in range(1000)])
    assert rows.num_rows() == 1000
    packed = pickle.dumps(rows)
    assert len(packed) < 500
    monkeypatch.chdir("/")
    arrived: Rows = pickle.loads(packed)
    assert arrived.name == rows.name
    assert arrived.num_rows() == 1000
    arrived.append(pa.Table.from_pylist([row("more")]))
    assert rows_of(tmp_path / "store").num_rows() == 1001


def test_a_run_registers_what_it_asked_for(tmp_path: Path) -> None:
    def registered() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (tmp_path / ".runs").glob("*")]

    store = Store(tmp_path)
    first = store.rows("groups", {"a": 1}).name
    second = store.artifact("checkpoints", {"a": 1}).name
    assert store.used == {first, second}
    store.register_run(tmp_path / "run")
    expected = {"run_dir": str(tmp_path / "run"), "host": socket.gethostname()}
    assert registered() == [{**expected, "artifacts": sorted([first, second])}]
    later = Store(tmp_path)
    third = later.rows("groups", {"a": 2}).name
    later.register_run(tmp_path / "run")
    assert registered() == [{**expected, "artifacts": sorted([first, second, third])}]
    later.register_run(tmp_path / "other")
    assert len(registered()) == 2


def test_missing_keeps_the_order_and_grows_less(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    wanted = keys(("z", "1"), ("a", "1"), ("m", "1"), ("a", "2"))
    assert rows.missing(wanted).to_pylist() == wanted.to_pylist()
    write(rows, row("a", "1"))
    assert rows.missing(wanted).to_pylist() == keys(("z", "1"), ("m", "1"), ("a", "2")).to_pylist()
    write(rows, row("z", "1"), row("m", "1"), row("a", "2"))
    assert rows.missing(wanted).num_rows == 0
    assert rows_of(tmp_path).missing(wanted).num_rows == 0


def test_the_first_of_two_equal_keys_wins_and_is_counted_once(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path), rows_of(tmp_path)
    write(first, row("a", value=1), row("b", value=1))
    write(second, row("a", value=2), row("c", value=2))
    for reader in (first, second, rows_of(tmp_path)):
        assert values(reader, "a", "b", "c") == [("a", "c", 1), ("b", "c", 1), ("c", "c", 2)]
        assert reader.num_rows() == 3


def test_one_shard_never_holds_a_key_twice(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="duplicate row key"):
        rows_of(tmp_path).append(pa.Table.from_pylist([row("a"), row("a")]))


def test_a_null_where_none_is_allowed_is_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    with pytest.raises(RunError, match="schema"):
        rows.append(pa.Table.from_pylist([row("a") | {"logprob": None}]))
    assert rows.num_rows() == 0


def test_the_readable_spec_stands_beside_the_shards(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    write(rows, row("a"))
    assert json.loads((rows.path / "spec.json").read_text()) == SPEC
    assert rows.path.name == content_hash(SPEC)


def test_collected_rows_survive_an_error(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)

    def interrupted() -> None:
        with rows.lock(), rows.writer() as writer:
            writer.add([row("a", value=7)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert values(rows_of(tmp_path), "a") == [("a", "c", 7)]


def test_reasons_are_recorded_before_what_they_explain(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cause, effect = store.rows("reference-logprobs", {"a": 1}), store.rows("reference-logprobs", {"b": 1})
    with cause.writer() as first, effect.writer(after=first) as second:
        first.add([row("a")])
        second.add([row("a")])
        second.flush()
        assert cause.num_rows() == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("12")), unique=True), max_size=5))
def test_like_a_dictionary_in_which_the_first_value_stays(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[str, str]]]
) -> None:
    rows = rows_of(tmp_path_factory.mktemp("store"))
    expected: dict[tuple[str, str], float] = {}
    for number, shard in enumerate(shards):
        rows.append(pa.Table.from_pylist([row(*pair, value=number) for pair in shard], schema=rows.schema))
        for pair in shard:
            expected.setdefault(pair, float(number))
    everything = [(e, c) for e in "abcdef" for c in "12"]
    assert rows.missing(keys(*everything)).num_rows == len(everything) - len(expected)
    assert values(rows, *"abcdef") == [(*pair, expected[pair]) for pair in everything if pair in expected]


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


def manifest_of(shard: Path) -> Path:
    return shard.parents[1] / "manifests" / f"{shard.stem}.json"


def set_rows(manifest: Path, rows: int) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "rows": rows}))


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-4]), "bytes instead of"),
        (flip, "checksum differs"),
        (lambda shard: shard.unlink(), "its file is gone"),
        (
            lambda shard: (flip(shard), manifest_of(shard).write_text("{")),
            "its manifest is unreadable, and its checksum",
        ),
        (lambda shard: set_rows(manifest_of(shard), 7), "it has 1 rows instead of 7"),
    ],
    ids=["truncated", "one bit", "gone", "with its manifest", "rows"],
)
def test_a_damaged_shard_is_named_set_aside_and_made_again(
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
def test_a_damaged_manifest_is_made_again_from_its_shard(
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


def test_shards_of_another_artifact_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
def test_damaged_hashes_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
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


# ── interruption ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_interrupted_at_every_write_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, crashed = 0, True
    while crashed:
        point += 1
        root = tmp_path / str(point)
        write(rows_of(root), row("old", value=1))
        with monkeypatch.context() as patch:
            crash_at(patch, point)
            try:
                rows_of(root).append(pa.Table.from_pylist([row("a", value=2), row("b", value=2)]))
                crashed = False
            except Crash:
                pass
        after = rows_of(root)
        assert after.num_rows() in (1, 3), "a shard is there whole or not at all"
        assert values(after, "old") == [("old", "c", 1)]
        missing = after.missing(keys(("a", "c"), ("b", "c"))).num_rows
        assert missing in (0, 2)
        write(after, *[row(name, value=2) for name in "ab"][:missing])
        assert values(rows_of(root), "a", "b", "old") == [("a", "c", 2), ("b", "c", 2), ("old", "c", 1)]
        with after.lock():
            leftovers = [path for path in after.path.rglob("*") if path.name.startswith(".tmp")]
        assert not leftovers, "the next writer clears what a dead one left"
    assert point > 8, "the loop must really have passed through the write points"


WORKER = """
import sys, time
from pathlib import Path
from cpo_pipe.data.store import Store
import pyarrow as pa
rows = Store(Path(sys.argv[1])).rows("reference-logprobs", {"model": "m", "dtype": "float32"})
wanted = pa.table({"example_id": [f"{i:04d}" for i in range(300)], "candidate_id": ["c"] * 300})
with rows.lock():
    todo = rows.missing(wanted)["example_id"].to_pylist()
    print("ready", flush=True)
    for start in range(0, len(todo), 4):
        with rows.writer() as writer:
            writer.add([{"example_id": e, "candidate_id": "c", "logprob": float(e), "num_tokens": 1}
                        for e in todo[start:start + 4]])
"""


def test_killed_for_real_and_resumed(tmp_path: Path) -> None:
    random.seed(0)
    progress = []
    for attempt in range(40):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < 5:
            time.sleep(random.uniform(0.01, 0.15))
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        progress.append(rows_of(tmp_path).num_rows())
        if progress[-1] == 300:
            break
    assert progress == sorted(progress), "nothing is ever lost"
    assert progress[-1] == 300
    rows = rows_of(tmp_path)
    with rows.lock():
        pass  # the last one may have been killed while it merged shards: who comes next ends that
    assert sum(pq.read_metadata(path).num_rows for path in rows.files()) == 300, "nothing is doubled"
    everyone = [f"{i:04d}" for i in range(300)]
    assert values(rows, *everyone) == [(name, "c", float(name)) for name in everyone]


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    rows = rows_of(tmp_path)
    assert sum(pq.read_metadata(path).num_rows for path in rows.files()) == rows.num_rows() == 300


# ── artifacts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_artifact_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, crashed = 0, True
    while crashed:
        point += 1
        store = Store(tmp_path / str(point))
        with monkeypatch.context() as patch:
            crash_at(patch, point)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            try:
                make(store, "new")
                crashed = False
            except Crash:
                pass
        artifact = Store(tmp_path / str(point)).artifact("checkpoints", {"p": 1})
        if not artifact.complete():
            assert not artifact.path.exists()
            make(store, "new")
        assert artifact.complete()
        assert (artifact.path / "weights").read_text() == "new"
        assert artifact.manifest["max_steps"] == 3
        assert [path.name for path in artifact.path.parent.iterdir() if not path.name.startswith(".locks")] == [
            artifact.path.name
        ]
    assert point > 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', '{"files": null}', '{"files": [1]}', "\x00"])
def test_a_manifest_of_any_other_form_is_damage(tmp_path: Path, content: str) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / "manifest.json").write_text(content)
    assert not artifact.complete()
    with pytest.raises(RunError, match=r"manifest\.json: damaged"):
        _ = artifact.manifest
    make(Store(tmp_path), "good")
    assert artifact.complete()


def test_artifacts_whose_folders_were_swapped_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifacts = [Store(tmp_path).artifact("checkpoints", {"p": number}) for number in (1, 2)]
    for artifact in artifacts:
        with artifact.create() as writer:
            (writer.path / "weights").write_text(artifact.name)
    one, other = (artifact.path for artifact in artifacts)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert not any(artifact.complete() for artifact in artifacts)
    assert f"{artifacts[0].name} is damaged (its files belong to {artifacts[1].name})" in caplog.text


@pytest.mark.parametrize("harmed", ["weights", "manifest.json"])
def test_a_damaged_artifact_is_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture, harmed: str) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / harmed).write_text("bad")
    assert not artifact.complete()
    assert harmed in caplog.text
    make(Store(tmp_path), "good")
    assert artifact.complete()


def test_a_store_without_write_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--store .*file.*cannot be made"):
        Store(tmp_path / "file")


READER = """
import sys
from pathlib import Path
from cpo_pipe.data.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(store.rows("reference-logprobs", {"model": "m", "dtype": "float32"}).num_rows())
"""


def test_readers_that_find_the_same_damage_do_not_trip_over_each_other(tmp_path: Path) -> None:
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


def test_only_the_holder_of_the_lock_quarantines_an_artifact(tmp_path: Path) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / "weights").write_text("bad")
    assert not artifact.complete()
    assert artifact.path.exists(), "another process may be remaking it this very moment"
    with artifact.lock():
        assert not artifact.path.exists()
        assert len(list(artifact.path.parent.glob("*.damaged-*"))) == 1
