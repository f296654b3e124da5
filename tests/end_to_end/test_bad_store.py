"""A full disk, a store without write permission, and damaged files: nothing that is whole is lost."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpo_pipe.data.store import Store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a tmpfs with the given options, or changes the options of the mounted one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        remount = ["remount"] if mounted else []
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*remount, options]), "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk needs root and the right to mount")
        mounted.append(True)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_the_same_command_resumes(project, small_disk: Callable[[str], Path]) -> None:
    """The disk grows step by step: each run gets further and finds everything that was made before."""
    kept: dict[str, str] = {}
    failures = 0
    for kilobytes in (4, 60, 140, 400, 600, 800, 8000):
        project.store = small_disk(f"size={kilobytes}k") / "store"
        result = project.cli("run", "tiny.yaml", "--force", "--store", project.store)  # else it is refused at once
        assert kept.items() <= project.made().items()
        kept = project.made()
        if result.status == 0:
            break
        assert result.status == 1, result.err
        assert result.error() == (
            "error: the disk is full; what was made before is kept: free some space and run the same command again"
        )
        failures += 1
    assert result.status == 0
    assert failures >= 3
    assert not list(project.store.rglob(".tmp-*"))


def test_a_store_without_write_permission(project, small_disk: Callable[[str], Path]) -> None:
    project.store = small_disk("size=8m") / "store"
    assert project.cli("prepare", "tiny.yaml", "--store", project.store).status == 0
    before = project.made()
    small_disk("size=8m,ro")
    assert project.cli("prepare", "tiny.yaml", "--store", project.store).status == 0  # nothing to write
    result = project.cli("train", "tiny.yaml", "start", "--store", project.store)
    assert result.status == 2
    assert "--store: no permission to write checkpoints/" in result.error()
    assert project.made() == before


def shard(project, kind: str) -> Path:
    """Return the largest shard of a kind."""
    return max((project.store / kind).glob("*/shards/*.parquet"), key=lambda path: path.stat().st_size)


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [spoil_middle, cut_in_half, Path.unlink])
@pytest.mark.parametrize(
    ("kind", "maker", "reader"), [("negatives", "generate-negatives", "rank"), ("groups", "rank", "train")]
)
def test_a_corrupt_shard_is_named_and_can_be_made_again(
    made, kind: str, maker: str, reader: str, spoil: Callable
) -> None:
    before, damaged = made.made(), shard(made, kind)
    spoil(damaged)
    names = ["cpo"] if reader == "train" else []
    result = made.cli(reader, "tiny.yaml", *names)
    assert result.status == 2
    assert f"run `cpo-pipe {maker} tiny.yaml`" in result.error()
    assert f"shard {damaged.stem} is damaged" in result.err
    assert made.cli(maker, "tiny.yaml").status == 0
    assert made.cli(reader, "tiny.yaml", *names).status == 0
    lost = {path for path in before if damaged.stem in path}
    assert {path: sha for path, sha in before.items() if path not in lost}.items() <= made.made().items()
    assert Store(made.store).rows(kind, json.loads((damaged.parents[1] / "spec.json").read_text())).num_rows() > 0


@pytest.mark.parametrize("kind", ["examples", "checkpoints", "metrics"])
def test_a_corrupt_artifact_is_named_and_made_again(made, kind: str) -> None:
    files = [*(made.store / kind).rglob("*.parquet"), *(made.store / kind).rglob("*.safetensors")]
    cut_in_half(max(files, key=lambda path: path.stat().st_size))
    result = made.cli("run", "tiny.yaml")
    assert result.status == 0, result.err
    assert "damaged" in result.err
