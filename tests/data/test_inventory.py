"""The inventory: what is listed is what is recorded, damage is found, and only what nothing needs is garbage."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import canonical_json
from cpo_pipe.data.inventory import ABSENT, Artifact, Inventory, Unit, differences, faults
from cpo_pipe.data.store import Product, Rows, Store
from tests.conftest import rot

SPEC = {"model": "m", "dtype": "float32"}


def rows_of(root: Path, **changed: str) -> Rows:
    return Store(root).rows("reference-logprobs", {**SPEC, **changed})


def product_of(root: Path) -> Product:
    return Store(root).product("checkpoints", {"settings": {"steps": 2}})


def write(rows: Rows, *examples: str) -> None:
    content = [{"example_id": e, "candidate_id": "c", "logprob": 0.0, "num_tokens": 1} for e in examples]
    with rows.lock():
        rows.append(pa.Table.from_pylist(content, schema=rows.schema))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a table of two shards and a product."""
    write(rows_of(tmp_path), "a", "b", "c")
    write(rows_of(tmp_path), "d")
    with product_of(tmp_path).lock(), product_of(tmp_path).create() as writer:
        (writer.path / "sub").mkdir()
        (writer.path / "sub/weights").write_bytes(b"12345")
        writer.facts["fingerprint"] = "f" * 32
    return tmp_path


def register(root: Path, run_dir: Path, *names: str, host: str = socket.gethostname()) -> Path:
    (root / ".runs").mkdir(exist_ok=True)
    file = root / ".runs" / f"{hashlib.sha256(f'{run_dir}{host}'.encode()).hexdigest()}.json"
    file.write_text(json.dumps({"run_dir": str(run_dir), "host": host, "artifacts": names}))
    return file


def table_of(root: Path) -> Artifact:
    return Inventory(root).find("reference-logprobs/")


def content_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def found_in(artifact: Artifact) -> list[str]:
    return list(faults(artifact, lambda size: None))


# ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────


def test_artifacts_are_told_from_manifests_alone(root: Path) -> None:
    sizes = {path.stem: path.stat().st_size for path in root.glob("*/*/shards/*")}
    shutil.rmtree(next(root.glob("*/*/shards")))
    table, product = Inventory(root).artifacts()
    assert (table.name, table.rows, table.size) == (rows_of(root).name, 4, sum(sizes.values()))
    assert table.files == {f"shards/{name}.parquet": sizes[name] for name in sorted(sizes)}
    assert table.spec == SPEC
    assert table.written == pytest.approx(int(max(sizes).partition("-")[0]) / 1e9)
    assert (product.name, product.rows, product.files) == (product_of(root).name, None, {"sub/weights": 5})
    assert product.written is not None


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
    garbage = {str(item.path) for unit in Inventory(root).units() for item in unit.garbage(used=False)}
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


# ── soundness ────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(artifact: Artifact, table: pa.Table, **manifest: Any) -> None:
    """Replace the first shard, with a manifest that fits but for what is given."""
    shard = artifact.path / next(iter(artifact.files))
    pq.write_table(table, shard)
    content = shard.read_bytes()
    fitting = {"rows": table.num_rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (artifact.path / f"manifests/{shard.stem}.json").write_text(json.dumps(fitting | manifest))


def first_shard(artifact: Artifact) -> pa.Table:
    return pq.read_table(artifact.path / next(iter(artifact.files)))


def first_manifest(artifact: Artifact) -> Path:
    return artifact.path / f"manifests/{next(iter(artifact.shards))}.json"


def test_a_sound_store_has_no_faults_and_all_of_it_is_read(root: Path) -> None:
    before = content_of(root)
    for artifact in Inventory(root).artifacts():
        sizes: list[int] = []
        assert list(faults(artifact, sizes.append)) == []
        assert sum(sizes) == artifact.size
    assert content_of(root) == before


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda a: flip(a.path / next(iter(a.files))), "its checksum differs"),
        (lambda a: (a.path / next(iter(a.files))).write_bytes(b"short"), "it has 5 bytes instead of"),
        (lambda a: (a.path / next(iter(a.files))).unlink(), "its file is gone"),
        (lambda a: first_manifest(a).write_text("{"), "its manifest is unreadable"),
        (lambda a: first_manifest(a).write_text("[1]"), "its manifest is unreadable"),
        (lambda a: rewrite(a, first_shard(a), rows="7"), "its manifest is unreadable"),
        (lambda a: rewrite(a, first_shard(a), rows=7), "it has 3 rows instead of 7"),
        (lambda a: rewrite(a, pa.concat_tables([first_shard(a)] * 2)), "3 row keys stand twice"),
        (lambda a: rewrite(a, first_shard(a).drop(["logprob"])), "its column logprob is absent"),
        (
            lambda a: rewrite(a, first_shard(a).cast(first_shard(a).schema.set(3, pa.field("num_tokens", pa.int64())))),
            "its column num_tokens is int64, but of this version int32 not null",
        ),
        (lambda a: (a.path / "spec.json").unlink(), "spec.json is gone or unreadable"),
        (lambda a: (a.path / "spec.json").write_text('{"model": "another"}'), "spec.json is that of"),
    ],
)
def test_each_kind_of_damage_to_rows_is_found_and_nothing_is_changed(
    root: Path, damage: Callable[[Artifact], object], fault: str
) -> None:
    damage(table_of(root))
    before = content_of(root)
    (found,) = found_in(table_of(root))
    assert fault in found
    assert content_of(root) == before
    assert found_in(Inventory(root).find("checkpoints/")) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: flip(path / "sub/weights"), "sub/weights: its checksum differs"),
        (lambda path: (path / "sub/weights").unlink(), "sub/weights: it is gone"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is gone or unreadable"),
        (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json is gone or unreadable"),
        (lambda path: (path / "manifest.json").write_text('{"files": [1]}'), "manifest.json is gone or unreadable"),
        (lambda path: (path / "manifest.json").write_text('{"files": {}}'), "manifest.json is gone or unreadable, or"),
        (lambda path: change(path / "manifest.json", '"fff', '"ffe'), "manifest.json is gone or unreadable"),
        (lambda path: (path / "spec.json").write_text("nonsense"), "spec.json is gone or unreadable"),
    ],
)
def test_each_kind_of_damage_to_a_product_is_found(root: Path, damage: Callable[[Path], object], fault: str) -> None:
    product = Inventory(root).find("checkpoints/").path
    damage(product)
    (found,) = found_in(Artifact(product))
    assert found.startswith(fault)


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_shards_that_were_swapped_are_found(root: Path) -> None:
    write(rows_of(root, dtype="bfloat16"), "a")
    tables = Inventory(root).artifacts("reference-logprobs")
    shards = [next(iter(table.shards)) for table in tables]
    for one, other, shard in zip(tables, tables[::-1], shards, strict=True):
        for file in f"shards/{shard}.parquet", f"manifests/{shard}.json":
            shutil.copy(one.path / file, other.path / file)
    for table, owner in zip(Inventory(root).artifacts("reference-logprobs"), tables[::-1], strict=True):
        (fault,) = found_in(table)
        assert fault.endswith(f": it is a shard of {owner.name}")


def test_products_that_were_swapped_are_found(root: Path) -> None:
    one, other = (Store(root).product("checkpoints", {"steps": number}) for number in (1, 2))
    for product in (one, other):
        with product.create() as writer:
            (writer.path / "weights").write_text(product.name)
    one.path.rename(root / "aside")
    other.path.rename(one.path)
    assert f"manifest.json is that of {other.name}" in found_in(Artifact(one.path))


def test_damage_that_verify_finds_is_not_hidden_by_a_cached_hash(root: Path) -> None:
    product = product_of(root)
    (product.path / "model.safetensors").write_bytes(b"12345")
    change(product.path / "manifest.json", "sub/weights", "model.safetensors")
    change(product.path / "manifest.json", '"checksum": "', '"was": "')
    assert Store(root).product("checkpoints", product.spec).complete()
    rot(product.path / "model.safetensors", root)
    assert Store(root).product("checkpoints", product.spec).complete(), "its hash is cached"
    (fault,) = found_in(Artifact(product.path))
    assert fault == "model.safetensors: its checksum differs"
    assert not Store(root).product("checkpoints", product.spec).complete()


def test_a_shard_that_is_merged_meanwhile_is_no_damage(root: Path) -> None:
    table = table_of(root)
    assert table.shards
    first_manifest(table).unlink()
    (table.path / next(iter(table.files))).unlink()
    assert found_in(table) == []


# ── what nothing needs ───────────────────────────────────────────────────────────────────────────────────────────


def unit_of(root: Path, kind: str) -> Unit:
    (unit,) = (unit for unit in Inventory(root).units() if unit.path.parent.name == kind)
    return unit


def make_leftover(root: Path, kind: str, leftover: str) -> Path:
    path = root / leftover.format(address=next((root / kind).glob("[0-9a-f]*")).name)
    folder = path if path.suffix != ".parquet" else path.parent
    folder.mkdir(parents=True)
    (path if path != folder else folder / "file").write_bytes(b"123")
    return path


@pytest.mark.parametrize(
    ("kind", "leftover"),
    [
        ("reference-logprobs", "reference-logprobs/{address}/damaged"),
        ("reference-logprobs", "reference-logprobs/{address}/shards/sub/.tmp-12-x.parquet"),
        ("checkpoints", "checkpoints/.tmp-0a-{address}"),
        ("checkpoints", "checkpoints/{address}.damaged-123"),
        ("checkpoints", "checkpoints/.in-progress/{address}"),
    ],
)
def test_leftovers_are_garbage_and_the_artifact_beside_them_is_not(root: Path, kind: str, leftover: str) -> None:
    before = content_of(root)
    assert unit_of(root, kind).garbage(used=True) == []
    path = make_leftover(root, kind, leftover)
    unit = unit_of(root, kind)
    (item,) = unit.garbage(used=True)
    assert (item.path, item.size) == (path, 3)
    with unit.held(make=True):
        unit.delete([item])
    assert not path.exists()
    assert content_of(root).keys() - before.keys() <= {str(unit.lock)}


def test_a_shard_without_its_manifest_is_garbage(root: Path) -> None:
    table = table_of(root)
    first_manifest(table).unlink()
    (item,) = unit_of(root, "reference-logprobs").garbage(used=True)
    assert item.path == table.path / next(iter(table.files))


def test_the_state_of_a_training_that_is_not_finished_stays_as_long_as_a_run_wants_it(root: Path) -> None:
    state = make_leftover(root, "checkpoints", "checkpoints/.in-progress/{address}")
    shutil.rmtree(root / "checkpoints" / state.name)
    unit = unit_of(root, "checkpoints")
    assert unit.garbage(used=True) == []
    assert [item.path for item in unit.garbage(used=False)] == [state]


@pytest.mark.parametrize("kind", ["reference-logprobs", "checkpoints"])
def test_what_no_run_uses_goes_but_for_the_lock_that_someone_may_wait_for(root: Path, kind: str) -> None:
    unit = unit_of(root, kind)
    with unit.held(make=True) as held:
        assert held
        unit.delete(unit.garbage(used=False))
        assert unit.lock.exists()
    assert unit.garbage(used=False) == []
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
                unit.delete(unit.garbage(used=False))
            except Killed:
                finished = False
            else:
                finished = True
        rows, product = rows_of(copy), product_of(copy)
        for artifact in Inventory(copy).artifacts():
            missing_spec = artifact.path == unit.path and artifact.spec is None
            assert [fault for fault in found_in(artifact) if "manifest.json" not in fault] == [] or missing_spec
        assert product.complete() == (kind != "checkpoints" or allowed == 0)
        assert rows.num_rows() in ((0, 1, 3, 4) if kind == "reference-logprobs" else (4,))
        if finished:
            break
        again = unit_of(copy, kind)
        again.delete(again.garbage(used=False))
        assert again.garbage(used=False) == []
    assert finished
    assert allowed >= 3


def test_a_lock_that_another_process_holds_is_not_waited_for(root: Path) -> None:
    unit = unit_of(root, "reference-logprobs")
    code = f"import filelock, sys\nwith filelock.FileLock({str(unit.lock)!r}): print(1, flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    for make in (True, False):
        with unit.held(make=make) as held:
            assert not held
    holder.communicate()
    with unit.held(make=True) as held:
        assert held
        with pytest.raises(TimeoutError):
            FileLock(unit.lock).acquire(timeout=0)


def test_a_look_at_a_lock_makes_none(root: Path) -> None:
    shutil.rmtree(root / "checkpoints/.locks")
    with unit_of(root, "checkpoints").held(make=False) as held:
        assert held
    assert not (root / "checkpoints/.locks").exists()


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


# ── differences ──────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats(0, 2, width=16) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_equal_values_and_no_others_have_no_differences(a: Any, b: Any) -> None:
    assert list(differences(a, a)) == []
    assert bool(list(differences(a, b))) == (canonical_json(a) != canonical_json(b))


def test_differences_are_found_by_their_path() -> None:
    a = {"sampling": {"temperature": 1.0, "stop": [0]}, "parts": [{"count": 3}, {"count": 1}], "same": [1, {"x": None}]}
    b = {"sampling": {"temperature": 0.7, "stop": [0, 5]}, "parts": [{"count": 4}], "same": [1, {"x": None}], "new": 1}
    assert list(differences(a, b)) == [
        ("sampling.temperature", 1.0, 0.7),
        ("sampling.stop", [0], [0, 5]),
        ("parts[0].count", 3, 4),
        ("parts[1]", {"count": 1}, ABSENT),
        ("new", ABSENT, 1),
    ]


# ── remote stores ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_remote_store_is_looked_at_verified_and_cleaned_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upath")
    monkeypatch.setenv("CPO_PIPE_CACHE", str(tmp_path / "cache"))
    url: Any = f"memory://bucket/{tmp_path.name}"
    write(rows_of(url), "a", "b", "c")
    with product_of(url).lock(), product_of(url).create() as writer:
        (writer.path / "weights").write_bytes(b"12345")
    table, product = Inventory(url).artifacts()
    assert (table.rows, product.files) == (3, {"weights": 5})
    assert (found_in(table), found_in(product)) == ([], [])
    (product.path / "weights").write_bytes(b"1234x")
    assert found_in(product) == ["weights: its checksum differs"]

    copy = product_of(url).path
    unfinished = product_of(url).in_progress / "1"
    unfinished.mkdir(parents=True)
    (table.path / "shards/1-ab.parquet").write_bytes(b"of another machine, which is about to record it")
    garbage = [item for unit in Inventory(url).units() for item in unit.garbage(used=True)]
    assert [item.path for item in garbage] == [unfinished.parent]
    for unit in Inventory(url).units():
        with unit.held(make=True) as held:
            assert held
            unit.delete(unit.garbage(used=False))
    assert Inventory(url).artifacts() == []
    assert not copy.exists()
    assert not unfinished.exists()
    write(rows_of(url), "a")
    assert [artifact.rows for artifact in Inventory(url).artifacts()] == [1]
