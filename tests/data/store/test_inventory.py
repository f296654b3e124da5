"""What is listed is what is recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store.gc import delete_garbage, garbage_of
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.locks import try_lock
from tests.support.inventory import SPEC, checkpoint_of, found_in, register, rows_of, table_of, write


def test_artifacts_are_told_from_manifests_alone(root: Path) -> None:
    sizes = {path.stem: path.stat().st_size for path in root.glob("*/*/shards/*")}
    shutil.rmtree(next(root.glob("*/*/shards")))
    table, checkpoint = Inventory(root).artifacts()
    assert (table.name, table.rows, table.size) == (rows_of(root).name, 4, sum(sizes.values()))
    assert table.files == {f"shards/{name}.parquet": sizes[name] for name in sorted(sizes)}
    assert table.spec == SPEC
    assert table.written == pytest.approx(int(max(sizes).partition("-")[0]) / 1e9)
    assert (checkpoint.name, checkpoint.rows, checkpoint.files) == (checkpoint_of(root).name, None, {"sub/weights": 5})
    assert checkpoint.written is not None


def test_each_manifest_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda path, *rest, **more: seen.append(path) or read(path, *rest, **more))
    for artifact in Inventory(root).artifacts():
        _ = artifact.rows, artifact.size, artifact.written, artifact.files, artifact.spec, artifact.manifest
    assert len(seen) == len(set(seen))


def test_what_is_no_artifact_is_not_listed_and_never_garbage(root: Path) -> None:
    before = Inventory(root).artifacts()
    with rows_of(root, dtype="bfloat16").lock():  # leaves a folder with nothing but the lock
        pass
    (root / "photos/holiday").mkdir(parents=True)
    (root / "photos/holiday/1.jpg").touch()
    (root / "checkpoints/my-notes").mkdir()
    (root / "checkpoints/my-notes/a.txt").touch()
    assert Inventory(root).artifacts() == before
    garbage = {str(item.path) for unit in Inventory(root).folders() for item in garbage_of(unit, used=False)}
    assert garbage == {str(artifact.path) for artifact in before}


def test_shards_that_were_merged_count_once(root: Path) -> None:
    """As a merge that was killed leaves it: the merged shard is recorded, and one of the others is still there."""
    table = table_of(root)
    first, second = table.shards
    merged = f"{first}-0badcafe"
    (table.path / f"manifests/{merged}.json").write_text(
        json.dumps({"rows": 4, "bytes": 9, "sha256": "", "merged": [first, second]})
    )
    again = table_of(root)
    assert (list(again.shards), again.rows) == ([merged], 4)
    assert again.written == table.written


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Inventory(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("cut", [lambda name: name, lambda name: name[:-9], lambda name: name.partition("/")[2][:6]])
def test_a_name_may_be_cut(root: Path, cut: Callable[[str], str]) -> None:
    for artifact in Inventory(root).artifacts():
        assert Inventory(root).find(cut(artifact.name)) == artifact


def test_a_wrong_or_ambiguous_name_gets_the_near_ones(root: Path) -> None:
    names = [artifact.name for artifact in Inventory(root).artifacts()]
    with pytest.raises(InputError) as ambiguous:
        Inventory(root).find("")
    assert all(name in str(ambiguous.value) for name in names)
    wrong = names[0][:-1] + "x"
    with pytest.raises(InputError, match=f"did you mean {names[0]}"):
        Inventory(root).find(wrong)
    with pytest.raises(InputError, match="store ls"):
        Inventory(root).find("zzz")


def test_a_kind_that_is_not_there_gets_the_near_one(root: Path) -> None:
    assert [artifact.kind for artifact in Inventory(root).artifacts("checkpoints")] == ["checkpoints"]
    with pytest.raises(InputError, match="did you mean checkpoints"):
        Inventory(root).artifacts("checkpoint")


def test_registrations_hold_until_they_are_forgotten(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    register(root, tmp_path / "run", "a/1")
    register(root, tmp_path / "gone", "b/2")
    register(root, tmp_path / "gone", "c/3", host="elsewhere")
    inventory = Inventory(root)
    assert inventory.used() == {"a/1", "b/2", "c/3"}
    assert inventory.used([f"{tmp_path}/gone"]) == {"a/1", "c/3"}
    assert inventory.used([f"{tmp_path}/gone", f"{tmp_path}/gone@elsewhere"]) == {"a/1"}
    assert {run.run_dir.name + run.state for run in inventory.runs()} == {"run", "gone(missing)", "gone@elsewhere"}


@pytest.mark.parametrize("content", ["{", "[]", '{"run_dir": "x"}', '{"run_dir": 1, "host": "h", "artifacts": []}'])
def test_a_registration_that_cannot_be_read_is_refused(root: Path, content: str) -> None:
    register(root, root).write_text(content)
    with pytest.raises(InputError, match=r"\.json: damaged"):
        Inventory(root).used()
    assert Inventory(root).registrations() == ([], [next((root / ".runs").iterdir())])


def test_a_remote_store_is_looked_at_verified_and_cleaned_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upath")
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "cache"))
    url: Any = f"memory://bucket/{tmp_path.name}"
    write(rows_of(url), "a", "b", "c")
    with checkpoint_of(url).lock(), checkpoint_of(url).create() as writer:
        (writer.path / "weights").write_bytes(b"12345")
    table, checkpoint = Inventory(url).artifacts()
    assert (table.rows, checkpoint.files) == (3, {"weights": 5})
    assert (found_in(table), found_in(checkpoint)) == ([], [])
    (checkpoint.path / "weights").write_bytes(b"1234x")
    assert found_in(checkpoint) == ["weights: its checksum differs"]

    copy = checkpoint_of(url).path
    unfinished = checkpoint_of(url).in_progress / "1"
    unfinished.mkdir(parents=True)
    (table.path / "shards/1-ab.parquet").write_bytes(b"of another machine, which is about to record it")
    garbage = [item for unit in Inventory(url).folders() for item in garbage_of(unit, used=True)]
    assert [item.path for item in garbage] == [unfinished.parent]
    for unit in Inventory(url).folders():
        with try_lock(unit.lock, make=True) as held:
            assert held
            delete_garbage(unit, garbage_of(unit, used=False))
    assert Inventory(url).artifacts() == []
    assert not copy.exists()
    assert not unfinished.exists()
    write(rows_of(url), "a")
    assert [artifact.rows for artifact in Inventory(url).artifacts()] == [1]
