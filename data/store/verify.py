"""Whether what a store and its runs' folders hold is as it was recorded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpo_pipe.data.fingerprint import content_hash, distrust, sha256_file
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.records import Record, Registration, changed_files, run_record
from cpo_pipe.data.store.shards import shard_fault


def faults(artifact: ArtifactFolder, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield what is wrong with an artifact, found by reading all of it, a shard at a time; changes nothing.

    Args:
        artifact: what is read.
        advance: called with the size of each file once it is read.
    """
    if artifact.spec is None or content_hash(artifact.spec) != artifact.path.name:
        what = "is gone or unreadable" if artifact.spec is None else f"belongs to {content_hash(artifact.spec)}"
        yield f"spec.json {what}; this harms no run, but nothing tells any more what the artifact is"
    if artifact.table:
        for name, manifest in artifact.shards.items():
            fault = _shard_fault(artifact, name, manifest)
            if fault and artifact.shard_manifest(name).exists():  # else it was merged just now
                yield f"shard {name}: {fault}"
            advance(manifest.get("bytes", 0))
        return
    if (owner := artifact.manifest.get("artifact", artifact.name)) != artifact.name:
        yield f"manifest.json belongs to {owner}"
    if not artifact.manifest:
        yield "manifest.json is gone or unreadable, or lists no files"
    for name, size in artifact.files.items():
        if fault := _file_fault(artifact, name):
            yield f"{name}: {fault}"
        advance(size)


def _shard_fault(artifact: ArtifactFolder, name: str, manifest: Record) -> str | None:
    if not manifest:
        return "its manifest is unreadable"
    try:
        return shard_fault(artifact, name, artifact.shard(name).read_bytes(), manifest)
    except FileNotFoundError:
        return "its file is gone"


def _file_fault(artifact: ArtifactFolder, name: str) -> str | None:
    file: Any = artifact.path / name  # a Path or a UPath, whose methods are the same
    if not file.is_file():
        return "it is gone"
    if sha256_file(file) != artifact.manifest["files"][name]:
        if isinstance(file, Path):
            distrust(file)  # a cached hash of it would hide the damage from the next run
        return "its checksum differs"
    return None


def run_faults(run: Registration) -> Iterator[str]:
    """Yield what is wrong in a run's folder; changes nothing."""
    record = run_record(run.run_dir)
    if record is not None:
        yield from (f"{name}: gone or changed" for name in changed_files(run.run_dir, record))
    elif (run.run_dir / "run.json").exists():
        yield "run.json: unreadable"
