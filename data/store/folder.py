"""The folder of one artifact: where its files are, and what its spec and its manifests say.

    <root>/<kind>/<hash>/spec.json         the readable spec whose hash names the folder
    <root>/<kind>/<hash>/shards/*.parquet  rows, in shards that never change; small ones are merged into new ones
    <root>/<kind>/<hash>/manifests/*.json  one per shard, written last: a shard without one does not exist
    <root>/<kind>/<hash>/damaged/          quarantined shards, which no longer match their manifest
    <root>/<kind>/<hash>/manifest.json     of a directory artifact: its files with their hashes
    <root>/<kind>/.in-progress/<hash>/     unfinished state of a directory artifact, on this machine
    <root>/<kind>/.locks/<hash>/lock       lock of a directory artifact; that of rows is <hash>/lock
    <root>/.runs/*.json                    the artifacts that each run folder uses

Rows and directory artifacts are the two forms: `TABLES` (data/schemas.py) lists the kinds of rows.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpo_pipe.data.fingerprint import Spec, content_hash
from cpo_pipe.data.schemas import TABLES, Table
from cpo_pipe.data.store import atomic
from cpo_pipe.data.store.paths import AnyPath, in_parallel
from cpo_pipe.data.store.records import Record, artifact_manifest, read_record, shard_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArtifactFolder:
    """The folder of rows or of a directory artifact, there or not. Cached properties are read once."""

    path: AnyPath
    local: Path
    """Where this machine keeps its lock and its scratch files; `path` itself in a local store."""

    @property
    def kind(self) -> str:
        """Return the kind of artifact."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Return kind and hash, as messages name it."""
        return f"{self.kind}/{self.path.name}"

    @property
    def table(self) -> Table | None:
        """Return the schema and key of its rows; None of a directory artifact."""
        return TABLES.get(self.kind)

    @property
    def lock(self) -> Path:
        """Return the lock file that whoever makes the artifact holds."""
        folder = self.local if self.table else self.local.parent / ".locks" / self.local.name
        return folder / "lock"

    @property
    def in_progress(self) -> Path:
        """Return the folder of the unfinished state of a directory artifact."""
        return self.local.parent / ".in-progress" / self.local.name

    def exists(self) -> bool:
        """Return whether the artifact has any file besides its lock."""
        return any(child.name != "lock" for child in children(self.path))

    # ── spec and manifests ───────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def spec(self) -> Spec | None:
        """Return the spec; None where spec.json is gone or unreadable."""
        return read_record(self.path / "spec.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest of a directory artifact; empty where it is gone or unreadable."""
        return artifact_manifest(self.path / "manifest.json") or {}

    @cached_property
    def shards(self) -> dict[str, Record]:
        """Return the manifests of the recorded shards by their names, oldest first; one that is unreadable is empty."""
        names = sorted(self.recorded())
        paths = [self.shard_manifest(name) for name in names]
        if isinstance(self.path, Path):  # threads would cost more than they save
            found = [shard_manifest(path) or {} for path in paths]
        else:
            found = [manifest or {} for manifest in in_parallel(shard_manifest, paths)]
        # A merge that was killed half-way leaves both: the merged shard, and some of those that it replaces.
        merged = {name for manifest in found for name in manifest.get("merged", ())}
        return {name: manifest for name, manifest in zip(names, found, strict=True) if name not in merged}

    def shard(self, name: str) -> AnyPath:
        """Return the file of a shard."""
        return self.path / "shards" / f"{name}.parquet"

    def shard_manifest(self, name: str) -> AnyPath:
        """Return the manifest of a shard."""
        return self.path / "manifests" / f"{name}.json"

    def recorded(self) -> set[str]:
        """Return the names of the shards that have a manifest, as they are now."""
        folder = self.path / "manifests"
        try:
            # This runs before every look-up; `listdir` is much faster than `glob`.
            files = os.listdir(folder) if isinstance(folder, Path) else folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return set()
        names = (file.rpartition("/")[2] for file in files)
        return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}

    def write_spec(self, spec: Spec) -> None:
        """Write spec.json."""
        text = json.dumps(spec, indent=2, sort_keys=True, ensure_ascii=False)
        atomic.write_bytes(self.path / "spec.json", text.encode())

    def spec_owner(self) -> str | None:
        """Return the name of the artifact whose spec is in the folder; None where the spec is gone or damaged."""
        spec = read_record(self.path / "spec.json")
        return None if spec is None else f"{self.kind}/{content_hash(spec)}"

    def repair_spec(self, spec: Spec) -> None:
        """Make a damaged spec.json again: whoever asks for the artifact knows its spec."""
        if isinstance(self.path, Path) and self.spec_owner() != self.name and os.access(self.path, os.W_OK):
            log.warning("%s: spec.json was gone or damaged; made again", self.name)
            self.write_spec(spec)

    # ── what is recorded of the data ─────────────────────────────────────────────────────────────────────────────

    @cached_property
    def files(self) -> dict[str, int]:
        """Return the sizes of the data files in bytes, by path: as recorded for shards, as found for other files."""
        if self.table:
            return {f"shards/{name}.parquet": manifest.get("bytes", 0) for name, manifest in self.shards.items()}
        return {name: size_of(self.path / name) for name in self.manifest.get("files", ())}

    @property
    def size(self) -> int:
        """Return the size of the data files, in bytes."""
        return sum(self.files.values())

    @property
    def rows(self) -> int | None:
        """Return the recorded number of rows; None for a directory artifact without rows."""
        if self.table:
            return int(sum(manifest.get("rows", 0) for manifest in self.shards.values()))
        counts: dict[str, int] | None = self.manifest.get("examples")
        return None if counts is None else sum(counts.values())

    @property
    def written(self) -> float | None:
        """Return when it last grew, in seconds since 1970; None where nothing says."""
        if self.table:  # a shard's name says when it was begun
            names = [part for name, manifest in self.shards.items() for part in (name, *manifest.get("merged", ()))]
            return int(max(names).partition("-")[0]) / 1e9 if names else None
        with suppress(OSError):
            return (self.path / "manifest.json").stat().st_mtime or None
        return None


def children(folder: AnyPath) -> list[Any]:
    """Return the contents of a folder; an empty list if the folder does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []


def size_of(path: AnyPath) -> int:
    """Return the size of a file in bytes; 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
