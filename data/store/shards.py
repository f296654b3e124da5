"""Shards of rows: how one is written, checked, quarantined and removed, and which ones to merge."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.store import atomic
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.paths import AnyPath, in_parallel, shown
from cpo_pipe.data.store.records import Record

log = logging.getLogger(__name__)

SHARD_ROWS = 8192
"""Rows at which a shard is written."""
MERGED_SHARDS = 16
"""Small neighbouring shards are merged when there are this many."""
MERGED_ROWS = 4 * SHARD_ROWS
MERGED_BYTES = 16 << 20
"""A merge takes no more once it has this many rows, or bytes of files: it is done in memory."""

_ARTIFACT = b"cpo_pipe.artifact"
"""Key of a shard's metadata: the artifact that the shard belongs to."""
_CHECKSUM_IN_NAME = 8
"""Digits of a shard's checksum at the end of its name."""


def write_shard(folder: ArtifactFolder, place: str, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Write a shard, then its manifest; the shard's name begins with `place`."""
    sink = pa.BufferOutputStream()
    metadata = {**(table.schema.metadata or {}), _ARTIFACT: folder.name}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"{place}-{hashlib.sha256(content).hexdigest()[:_CHECKSUM_IN_NAME]}"
    atomic.write_bytes(folder.shard(name), content)
    write_manifest(folder, name, table.num_rows, content, facts)


def write_manifest(
    folder: ArtifactFolder, name: str, rows: int, content: bytes, facts: Mapping[str, Any] | None = None
) -> None:
    """Record a shard of `rows` rows."""
    manifest = {
        "rows": rows,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **(facts or {}),
    }
    atomic.write_bytes(folder.shard_manifest(name), json.dumps(manifest).encode())


def shard_fault(folder: ArtifactFolder, name: str, content: bytes, manifest: Record | None) -> str | None:
    """Return how a shard's content differs from what was recorded of it, or None.

    Without a manifest, the checksum in the shard's name counts.

    Raises:
        pa.ArrowException: it is not a Parquet file.
    """
    checksum = hashlib.sha256(content).hexdigest()
    if manifest is None:
        if checksum[:_CHECKSUM_IN_NAME] != name.rpartition("-")[2]:
            return "its manifest is unreadable, and its checksum is not that of its name"
    elif checksum != manifest["sha256"]:
        return "its checksum differs"
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        owner = (file.schema_arrow.metadata or {}).get(_ARTIFACT, folder.name.encode()).decode()
    return f"it is a shard of {owner}" if owner != folder.name else None


def quarantine_shard(folder: ArtifactFolder, name: str, fault: str) -> None:
    """Move a damaged shard and its manifest out of the table."""
    damaged = folder.path / "damaged"
    if isinstance(damaged, Path):
        damaged.mkdir(exist_ok=True)
    for path in (folder.shard_manifest(name), folder.shard(name)):
        with suppress(FileNotFoundError):  # two readers may find the same damage
            path.rename(damaged / path.name)  # type: ignore[arg-type]  # both local or both remote
    log.warning("%s: shard %s is damaged (%s); quarantined in %s; its rows will be made again",
                folder.name, name, fault, shown(damaged))  # fmt: skip


def remove_shards(folder: ArtifactFolder, names: Sequence[str]) -> None:
    """Remove shards that were merged: their manifests, the first one last, then their files."""
    first, *others = map(folder.shard_manifest, names)
    _unlink(others)
    _unlink([first])
    if isinstance(first, Path):
        atomic.sync(first.parent)  # a manifest without its shard would be damage
    _unlink(map(folder.shard, names))


def _unlink(paths: Iterable[AnyPath]) -> None:
    for _ in in_parallel(lambda path: path.unlink(missing_ok=True), paths):
        pass


def plan_merges(shards: Sequence[tuple[str, int, int]]) -> list[list[str]]:
    """Return which shards to merge, given name, rows and bytes of each in the order of names.

    A merge makes a shard with at least `limit` rows of shards with fewer. There are three limits, so that no row is
    written more than three times again, and of shards below a limit only a few are left: those that have too few rows
    in all, and up to fifteen others.
    """
    merges: list[list[str]] = []
    merged: set[str] = set()
    for limit in (SHARD_ROWS, SHARD_ROWS >> 4, SHARD_ROWS >> 8):
        names, total_rows, total_bytes = list[str](), 0, 0
        for name, rows, size in shards:
            small = rows < limit and size < MERGED_BYTES // 2 and name not in merged
            if small:
                names.append(name)
                total_rows, total_bytes = total_rows + rows, total_bytes + size
            enough = len(names) >= MERGED_SHARDS and total_rows >= limit
            enough |= total_rows >= MERGED_ROWS or total_bytes >= MERGED_BYTES
            if enough:
                merges.append(names)
                merged.update(names)
            if enough or not small:
                names, total_rows, total_bytes = [], 0, 0
    return merges
