"""Only what nothing needs is garbage, and a deletion that is killed leaves a consistent store."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.gc import delete_garbage, garbage_of
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.locks import try_lock
from tests.support.inventory import checkpoint_of, content_of, first_manifest, found_in, rows_of, table_of, write


def unit_of(root: Path, kind: str) -> ArtifactFolder:
    (unit,) = (unit for unit in Inventory(root).folders() if unit.path.parent.name == kind)
    return unit


def make_leftover(root: Path, kind: str, leftover: str) -> Path:
    path = root / leftover.format(hash_=next((root / kind).glob("[0-9a-f]*")).name)
    folder = path if path.suffix != ".parquet" else path.parent
    folder.mkdir(parents=True)
    (path if path != folder else folder / "file").write_bytes(b"123")
    return path


@pytest.mark.parametrize(
    ("kind", "leftover"),
    [
        ("reference-logprobs", "reference-logprobs/{hash_}/damaged"),
        ("reference-logprobs", "reference-logprobs/{hash_}/shards/sub/.tmp-12-x.parquet"),
        ("checkpoints", "checkpoints/.tmp-0a-{hash_}"),
        ("checkpoints", "checkpoints/{hash_}.damaged-123"),
        ("checkpoints", "checkpoints/.in-progress/{hash_}"),
    ],
)
def test_leftovers_are_garbage_and_the_artifact_beside_them_is_not(root: Path, kind: str, leftover: str) -> None:
    before = content_of(root)
    assert garbage_of(unit_of(root, kind), used=True) == []
    path = make_leftover(root, kind, leftover)
    unit = unit_of(root, kind)
    (item,) = garbage_of(unit, used=True)
    assert (item.path, item.size) == (path, 3)
    with try_lock(unit.lock, make=True):
        delete_garbage(unit, [item])
    assert not path.exists()
    assert content_of(root).keys() - before.keys() <= {str(unit.lock)}


def test_a_shard_without_its_manifest_is_garbage(root: Path) -> None:
    table = table_of(root)
    first_manifest(table).unlink()
    (item,) = garbage_of(unit_of(root, "reference-logprobs"), used=True)
    assert item.path == table.path / next(iter(table.files))


def test_the_state_of_a_training_that_is_not_finished_stays_as_long_as_a_run_wants_it(root: Path) -> None:
    state = make_leftover(root, "checkpoints", "checkpoints/.in-progress/{hash_}")
    shutil.rmtree(root / "checkpoints" / state.name)
    unit = unit_of(root, "checkpoints")
    assert garbage_of(unit, used=True) == []
    assert [item.path for item in garbage_of(unit, used=False)] == [state]


@pytest.mark.parametrize("kind", ["reference-logprobs", "checkpoints"])
def test_what_no_run_uses_goes_but_for_the_lock_that_someone_may_wait_for(root: Path, kind: str) -> None:
    unit = unit_of(root, kind)
    with try_lock(unit.lock, make=True) as held:
        assert held
        delete_garbage(unit, garbage_of(unit, used=False))
        assert unit.lock.exists()
    assert garbage_of(unit, used=False) == []
    assert [artifact.kind for artifact in Inventory(root).artifacts()] == sorted(
        {"reference-logprobs", "checkpoints"} - {kind}
    )
    write(rows_of(root), "e")  # and it can be made again
    assert rows_of(root).num_rows() == (1 if kind == "reference-logprobs" else 5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["reference-logprobs", "checkpoints"])
def test_killed_while_it_deletes_a_store_is_consistent(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    unlink = Path.unlink
    for allowed in range(20):
        copy = tmp_path_factory.mktemp("copy") / "store"
        shutil.copytree(root, copy)
        unit, left = unit_of(copy, kind), iter(range(allowed))

        def killing(path: Path, missing_ok: bool = False, left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killing)
            try:
                delete_garbage(unit, garbage_of(unit, used=False))
            except Killed:
                finished = False
            else:
                finished = True
        rows, checkpoint = rows_of(copy), checkpoint_of(copy)
        for artifact in Inventory(copy).artifacts():
            missing_spec = artifact.path == unit.path and artifact.spec is None
            assert [fault for fault in found_in(artifact) if "manifest.json" not in fault] == [] or missing_spec
        assert checkpoint.complete() == (kind != "checkpoints" or allowed == 0)
        assert rows.num_rows() in ((0, 1, 3, 4) if kind == "reference-logprobs" else (4,))
        if finished:
            break
        again = unit_of(copy, kind)
        delete_garbage(again, garbage_of(again, used=False))
        assert garbage_of(again, used=False) == []
    assert finished
    assert allowed >= 3


def test_a_lock_that_another_process_holds_is_not_waited_for(root: Path) -> None:
    unit = unit_of(root, "reference-logprobs")
    code = f"import filelock, sys\nwith filelock.FileLock({str(unit.lock)!r}): print(1, flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    for make in (True, False):
        with try_lock(unit.lock, make=make) as held:
            assert not held
    holder.communicate()
    with try_lock(unit.lock, make=True) as held:
        assert held
        with pytest.raises(TimeoutError):
            FileLock(unit.lock).acquire(timeout=0)


def test_a_look_at_a_lock_makes_none(root: Path) -> None:
    shutil.rmtree(root / "checkpoints/.locks")
    with try_lock(unit_of(root, "checkpoints").lock, make=False) as held:
        assert held
    assert not (root / "checkpoints/.locks").exists()
