"""Whether what a store and its runs' folders hold is as it was recorded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import cause
from cpo_pipe.data.fingerprint import content_hash, distrust, sha256_file
from cpo_pipe.data.schemas import EXAMPLES, METRICS, REJECTED, Table
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.records import Record, Registration, changed_files, run_record
from cpo_pipe.data.store.shards import row_count_fault, shard_fault

_ARTIFACT_TABLES = {
    ("examples", "examples.parquet"): EXAMPLES,
    ("examples", "rejected.parquet"): REJECTED,
    ("metrics", "metrics.parquet"): METRICS,
}


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
            fault = _shard_fault(artifact, name, manifest, artifact.table)
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


def _shard_fault(artifact: ArtifactFolder, name: str, manifest: Record, table: Table) -> str | None:
    if not manifest:
        return "its manifest is unreadable"
    try:
        content = artifact.shard(name).read_bytes()
    except FileNotFoundError:
        return "its file is gone"
    try:
        if fault := shard_fault(artifact, name, content, manifest):
            return fault
        with pq.ParquetFile(pa.BufferReader(content)) as parquet:
            if fault := _schema_fault(parquet.schema_arrow, table.schema):
                return fault
            keys = parquet.read(columns=list(table.key))
    except pa.ArrowException as error:
        return f"it cannot be read ({cause(error)})"
    distinct = keys.group_by(list(table.key)).aggregate([]).num_rows
    return f"it has {keys.num_rows - distinct} duplicate row keys" if distinct != keys.num_rows else None


def _file_fault(artifact: ArtifactFolder, name: str) -> str | None:
    file: Any = artifact.path / name  # a Path or a UPath, whose methods are the same
    if not file.is_file():
        return "it is gone"
    if sha256_file(file) != artifact.manifest["files"][name]:
        if isinstance(file, Path):
            distrust(file)  # a cached hash of it would hide the damage from the next run
        return "its checksum differs"
    schema = _ARTIFACT_TABLES.get((artifact.kind, name))
    if schema is None:
        return None
    try:
        with file.open("rb") as opened, pq.ParquetFile(opened) as parquet:
            fault = None
            if name == "examples.parquet" and artifact.rows is not None:
                fault = row_count_fault(parquet, artifact.rows)
            return fault or _schema_fault(parquet.schema_arrow, schema)
    except pa.ArrowException as error:
        return f"it cannot be read ({cause(error)})"


def run_faults(run: Registration) -> Iterator[str]:
    """Yield what is wrong in a run's folder; changes nothing."""
    record = run_record(run.run_dir)
    if record is not None:
        yield from (f"{name}: gone or changed" for name in changed_files(run.run_dir, record))
    elif (run.run_dir / "run.json").exists():
        yield "run.json: unreadable"


def _schema_fault(found: pa.Schema, schema: pa.Schema) -> str | None:
    """Return what is not as data/schemas.py has it; the documentation of a column may be."""
    if found.equals(schema):
        return None
    for name in dict.fromkeys([*schema.names, *found.names]):
        here, there = (part.field(name) if name in part.names else None for part in (found, schema))
        if here is None or there is None or not here.equals(there):
            return f"its column {name} is {_type(here)}, but of this version {_type(there)}"
    return "its columns are in another order than this version's"


def _type(field: pa.Field | None) -> str:
    return "absent" if field is None else f"{field.type}{'' if field.nullable else ' not null'}"
