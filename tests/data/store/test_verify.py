"""Each kind of damage is found, and nothing is changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpo_pipe.data.store import Store
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.verify import faults
from tests.support.damage import rot
from tests.support.inventory import checkpoint_of, content_of, first_manifest, found_in, rows_of, table_of, write
from tests.support.store import flip


def test_a_valid_store_has_no_faults_and_all_of_it_is_read(root: Path) -> None:
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
        (lambda a: (a.path / next(iter(a.files))).write_bytes(b"short"), "its checksum differs"),
        (lambda a: (a.path / next(iter(a.files))).unlink(), "its file is gone"),
        (lambda a: first_manifest(a).write_text("{"), "its manifest is unreadable"),
        (lambda a: first_manifest(a).write_text("[1]"), "its manifest is unreadable"),
        (lambda a: change(first_manifest(a), '"rows": 3', '"rows": "7"'), "its manifest is unreadable"),
        (lambda a: (a.path / "spec.json").unlink(), "spec.json is gone or unreadable"),
        (lambda a: (a.path / "spec.json").write_text('{"model": "another"}'), "spec.json belongs to"),
    ],
)
def test_each_kind_of_damage_to_rows_is_found_and_nothing_is_changed(
    root: Path, damage: Callable[[ArtifactFolder], object], fault: str
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
def test_each_kind_of_damage_to_an_artifact_is_found(root: Path, damage: Callable[[Path], object], fault: str) -> None:
    checkpoint = Inventory(root).find("checkpoints/").path
    damage(checkpoint)
    (found,) = found_in(ArtifactFolder(checkpoint, checkpoint))
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


def test_artifacts_that_were_swapped_are_found(root: Path) -> None:
    one, other = (Store(root).artifact("checkpoints", {"max_steps": number}) for number in (1, 2))
    for checkpoint in (one, other):
        with checkpoint.create() as writer:
            (writer.path / "weights").write_text(checkpoint.name)
    one.path.rename(root / "aside")
    other.path.rename(one.path)
    assert f"manifest.json belongs to {other.name}" in found_in(ArtifactFolder(one.path, one.path))


def test_damage_that_verify_finds_is_not_hidden_by_a_cached_hash(root: Path) -> None:
    checkpoint = checkpoint_of(root)
    (checkpoint.path / "model.safetensors").write_bytes(b"12345")
    change(checkpoint.path / "manifest.json", "sub/weights", "model.safetensors")
    change(checkpoint.path / "manifest.json", '"checksum": "', '"was": "')
    assert Store(root).artifact("checkpoints", checkpoint.spec).complete()
    rot(checkpoint.path / "model.safetensors", root)
    assert Store(root).artifact("checkpoints", checkpoint.spec).complete(), "its hash is cached"
    (fault,) = found_in(ArtifactFolder(checkpoint.path, checkpoint.path))
    assert fault == "model.safetensors: its checksum differs"
    assert not Store(root).artifact("checkpoints", checkpoint.spec).complete()


def test_a_shard_that_is_merged_meanwhile_is_no_damage(root: Path) -> None:
    table = table_of(root)
    assert table.shards
    first_manifest(table).unlink()
    (table.path / next(iter(table.files))).unlink()
    assert found_in(table) == []
