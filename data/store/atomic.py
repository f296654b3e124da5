"""Files that are complete or absent: temporary name, fsync, rename, fsync of the folder; remote ones: one put."""

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.store.paths import AnyPath, reported


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a written file or folder its final name, durably."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


def temporary(path: Path) -> Path:
    """Return a name beside `path` that no reader looks at."""
    return path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a small table as a Parquet file that is complete or absent."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    write_bytes(path, content.getvalue().to_pybytes())


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write a file that fits into memory so that it is complete or absent.

    Raises:
        InputError: a remote root does not take it.
    """
    if not isinstance(path, Path):
        with reported(path):
            path.fs.pipe_file(path.path, content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary(path)
    try:
        scratch.write_bytes(content)
        rename(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
