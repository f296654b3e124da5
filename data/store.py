"""The artifact store: row tables that only grow, and whole products, addressed by what decides their values.

    <root>/<kind>/<address>/spec.json         the readable spec whose hash is the address
    <root>/<kind>/<address>/shards/*.parquet  rows, in shards that are never rewritten
    <root>/<kind>/<address>/manifests/*.json  one per shard, written last: a shard without one does not exist
    <root>/<kind>/<address>/damaged/          shards set aside because they no longer match their manifest
    <root>/<kind>/<address>/manifest.json     of a whole product (a folder of files), with each file's hash

Killed at any instant, a writer loses at most the shard in flight; a reader never sees half of anything.
"""

import errno
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from cpo_pipe.data import atomic
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import FileHashes, Spec, address, sha256_file
from cpo_pipe.data.schemas import TABLES

log = logging.getLogger(__name__)

SHARD_ROWS = 8192
SHARD_SECONDS = 30.0


class Store:
    """A folder of artifacts shared by all runs that point to it."""

    def __init__(self, root: Path):
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--store {root}: cannot be made ({error.strerror}); give a folder you may write to"
            ) from error
        self.hash_file = FileHashes(root / "file-hashes.json", atomic.write_bytes)
        self._rows: dict[Path, Rows] = {}

    def rows(self, kind: str, spec: Spec) -> "Rows":
        """The growing table of this kind and spec; nothing is written until rows are."""
        path = self.root / kind / address(spec)
        if path not in self._rows:
            self._rows[path] = Rows(path, kind, spec)
        return self._rows[path]

    def product(self, kind: str, spec: Spec) -> "Product":
        """The whole product (a folder of files) of this kind and spec, made or not."""
        return Product(self.root / kind / address(spec), spec, self.hash_file)


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the artifact's lock. The system releases it when a process dies, however it dies."""
    lock = FileLock(path / "lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: another process is making it; waiting for it to finish", what)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(
            f"--store: no permission to write {what} there ({path}); give one that you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


class Rows:
    """A table of rows identified by a key, grown shard by shard; made by `Store.rows`."""

    def __init__(self, path: Path, kind: str, spec: Spec):
        self.path = path
        self.kind = kind
        self.spec = spec
        self.schema = TABLES[kind].schema
        self.key = TABLES[kind].key
        self._shards: list[str] = []
        self._index: pa.Table = self._empty_index()

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.kind}/{self.path.name}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making missing rows, so that two local processes do not do the same work."""
        with _locked(self.path, self.name):
            for shard in self.path.glob("shards/*.parquet"):
                if not (self.path / "manifests" / f"{shard.stem}.json").exists():
                    shard.unlink()  # its writer died before it was recorded
            for scratch in self.path.rglob(".tmp-*"):
                scratch.unlink()
            yield

    def append(self, table: pa.Table) -> None:
        """Record `table` as one shard. Complete or absent, also when killed between any two instructions.

        Raises:
            RunError: a key stands twice in `table`, or its columns do not fit the schema.
        """
        if not table.num_rows:
            return
        try:
            table = table.select(self.schema.names).cast(self.schema)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise RunError(f"{self.name}: rows do not fit the schema ({error})") from error
        if table.group_by(list(self.key)).aggregate([]).num_rows != table.num_rows:
            raise RunError(f"{self.name}: the same row key stands twice in one shard")
        self._write_spec()
        shards, manifests = self.path / "shards", self.path / "manifests"
        shards.mkdir(exist_ok=True)
        scratch = atomic.temporary(shards / "shard.parquet")  # several processes may write under one lock
        try:
            pq.write_table(table, scratch, compression="zstd")
            checksum = sha256_file(scratch)
            # Names order by time, so that a row that was ever read stays the one that wins over a later duplicate.
            name = f"{time.time_ns():019d}-{checksum[:8]}"
            size = scratch.stat().st_size
            atomic.rename(scratch, shards / f"{name}.parquet")
        finally:
            scratch.unlink(missing_ok=True)
        ids = table["example_id"]
        manifest = {
            "rows": table.num_rows,
            "bytes": size,
            "sha256": checksum,
            "example_ids": [pc.min(ids).as_py(), pc.max(ids).as_py()],
        }
        atomic.write_bytes(manifests / f"{name}.json", json.dumps(manifest).encode())

    @contextmanager
    def writer(self, after: "ShardWriter | None" = None) -> Iterator["ShardWriter"]:
        """Collect rows and append them a shard at a time; what is collected is kept also when an error ends the block.

        What `after` has collected is recorded first whenever these rows are.
        """
        writer = ShardWriter(self, after)
        try:
            yield writer
        except BaseException as error:
            # On a full or failing disk another write would only hide the trouble.
            if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)):
                writer.flush()
            raise
        writer.flush()

    def missing(self, wanted: pa.Table) -> pa.Table:
        """Those of the `wanted` row keys (a table of the key columns) that are not recorded, in the same order."""
        wanted = wanted.select(list(self.key)).cast(self._key_schema())
        ordered = wanted.append_column("_order", pa.array(np.arange(wanted.num_rows)))
        found = ordered.join(self._refreshed().select(list(self.key)), keys=list(self.key), join_type="left anti")
        return wanted.take(np.sort(found["_order"].to_numpy()))

    def read(self, example_ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of these examples, in the order given, then by the rest of the row key.

        Reads only the shards that hold them. Examples without rows are simply not there: ask `missing` first.
        """
        order = pa.table({"example_id": pa.array(example_ids, pa.string()), "_order": np.arange(len(example_ids))})
        rest = [(name, "ascending") for name in self.key[1:]]
        hits = self._refreshed().join(order, keys="example_id", join_type="inner")
        hits = hits.sort_by([("_order", "ascending"), *rest])
        shard, row = hits["_shard"].to_numpy(), hits["_row"].to_numpy()
        names = self.schema.names if columns is None else list(columns)
        parts: list[pa.Table] = []
        positions: list[np.ndarray[Any, Any]] = []
        for number in np.unique(shard):
            at = np.flatnonzero(shard == number)
            parts.append(pq.read_table(self._shard_path(self._shards[number]), columns=names).take(row[at]))
            positions.append(at)
        if not parts:
            return pa.schema([self.schema.field(name) for name in names]).empty_table()
        return pa.concat_tables(parts).take(np.argsort(np.concatenate(positions), kind="stable"))

    def batches(
        self, example_ids: Sequence[str], size: int = 1024, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """`read` in slices of `size` examples, so that memory is bounded by a slice and a shard."""
        for start in range(0, len(example_ids), size):
            yield self.read(example_ids[start : start + size], columns)

    def files(self) -> list[Path]:
        """The recorded shards."""
        self._refreshed()
        return [self._shard_path(name) for name in self._shards]

    def num_rows(self) -> int:
        """Recorded rows, duplicates counted once."""
        return int(self._refreshed().num_rows)

    def _shard_path(self, name: str) -> Path:
        return self.path / "shards" / f"{name}.parquet"

    def _write_spec(self) -> None:
        path = self.path / "spec.json"
        if not path.exists():
            atomic.write_bytes(path, json.dumps(self.spec, indent=2, sort_keys=True, ensure_ascii=False).encode())

    def _key_schema(self) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in self.key])

    def _empty_index(self) -> pa.Table:
        places = [pa.field("_shard", pa.int32()), pa.field("_row", pa.int32())]
        return pa.schema([*self._key_schema(), *places]).empty_table()

    def _refreshed(self) -> pa.Table:
        """The index of recorded rows (key, shard number, row number), brought up to date with the folder."""
        recorded = sorted(path.stem for path in self.path.glob("manifests/[!.]*.json"))
        if recorded == self._shards:
            return self._index
        known = {name: number for number, name in enumerate(self._shards)}
        parts: list[pa.Table] = []
        shards: list[str] = []
        for name in recorded:
            keys = None
            if name in known:
                keys = self._index.filter(pc.equal(self._index["_shard"], known[name])).drop(["_shard"])
            elif self._is_sound(name):
                keys = pq.read_table(self._shard_path(name), columns=list(self.key)).cast(self._key_schema())
                keys = keys.append_column("_row", pa.array(np.arange(keys.num_rows), pa.int32()))
            if keys is not None:
                number = pa.array(np.full(keys.num_rows, len(shards)), pa.int32())
                parts.append(keys.append_column("_shard", number).select(self._index.column_names))
                shards.append(name)
        self._index = _first_of_each(pa.concat_tables(parts), self.key) if parts else self._empty_index()
        self._shards = shards
        return self._index

    def _is_sound(self, name: str) -> bool:
        """Whether a shard still is what its manifest says; a shard that is not is named and set aside."""
        shard, manifest_path = self._shard_path(name), self.path / "manifests" / f"{name}.json"
        try:
            manifest = json.loads(manifest_path.read_text())
        except FileNotFoundError:  # another reader has just set it aside
            return False
        except ValueError:
            manifest = {}
        try:
            if not shard.exists():
                fault = "its file is gone"
            elif shard.stat().st_size != manifest["bytes"]:
                fault = f"it has {shard.stat().st_size} bytes instead of {manifest['bytes']}"
            elif sha256_file(shard) != manifest["sha256"]:
                fault = "its checksum differs"
            else:
                return True
        except (KeyError, TypeError):
            fault = "its manifest is unreadable"
        damaged = self.path / "damaged"
        damaged.mkdir(exist_ok=True)
        for path in (manifest_path, shard):
            with suppress(FileNotFoundError):  # two readers may find the same damage
                path.replace(damaged / path.name)
        log.warning("%s: shard %s is damaged (%s); set aside in %s; its rows will be made again",
                    self.name, name, fault, damaged)  # fmt: skip
        return False


def _first_of_each(index: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows of `index` whose key was not seen before them."""
    numbered = index.append_column("_position", pa.array(np.arange(index.num_rows)))
    first = numbered.group_by(list(key)).aggregate([("_position", "min")])["_position_min"]
    return index if len(first) == index.num_rows else index.take(pc.take(first, pc.array_sort_indices(first)))


class ShardWriter:
    """Collects rows for `Rows.writer`; a shard is written at 8,192 rows or after 30 seconds, whichever is first."""

    def __init__(self, rows: Rows, after: "ShardWriter | None" = None):
        self._rows = rows
        self._after = after
        self._pending: list[pa.Table] = []
        self._count = 0
        self._since = time.monotonic()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, given as mappings from column to value."""
        if rows:
            self._pending.append(pa.Table.from_pylist(list(rows), schema=self._rows.schema))
            self._count += len(rows)
        if self._count >= SHARD_ROWS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one shard."""
        pending, self._pending, self._count = self._pending, [], 0
        self._since = time.monotonic()
        if self._after is not None:
            self._after.flush()
        if pending:
            self._rows.append(pa.concat_tables(pending))


class Product:
    """A folder of files that is complete or absent (a checkpoint, prepared examples, …); made by `Store.product`."""

    def __init__(self, path: Path, spec: Spec, hash_file: FileHashes):
        self.path = path
        self.spec = spec
        self._hash_file = hash_file

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def manifest(self) -> dict[str, Any]:
        """What `create` recorded: the files with their hashes, and the caller's facts."""
        content: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return content

    @property
    def in_progress(self) -> Path:
        """Where what makes it keeps its unfinished state."""
        return self.path.parent / ".in-progress" / self.path.name

    def complete(self) -> bool:
        """Whether it is there and undamaged."""
        if not self.path.exists():
            return False
        broken = self._broken()
        if broken is not None:
            log.warning("%s is damaged (%s); it will be set aside and made again", self.name, broken)
        return broken is None

    def _broken(self) -> str | None:
        """The first file that is not what the manifest says."""
        try:
            files = self.manifest["files"]
            return next((name for name, sha256 in files.items() if not self._is_sound(name, sha256)), None)
        except (FileNotFoundError, ValueError, KeyError):
            return "manifest.json"

    def _is_sound(self, name: str, sha256: str) -> bool:
        file = self.path / name
        return file.is_file() and self._hash_file(file) == sha256

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making it, so that two local processes do not do the same work. Sets a damaged one aside."""
        locks = self.path.parent / ".locks" / self.path.name
        with _locked(locks, self.name):
            for leftover in self.path.parent.glob(f".tmp-*-{self.path.name}"):
                shutil.rmtree(leftover)
            if self.path.exists() and self._broken() is not None:
                self.path.replace(self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}"))
            yield

    def create(self) -> "ProductWriter":
        """A context that yields an empty folder; on success it becomes the product, on any error it is removed."""
        return ProductWriter(self)


class ProductWriter:
    """Context of `Product.create`. Fill `path`; put what should stand in the manifest into `facts`."""

    def __init__(self, product: Product):
        self._product = product
        self.path = atomic.temporary(product.path)
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "ProductWriter":
        self.path.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def _commit(self) -> None:
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        for file in files:
            atomic.sync(file)
        hashes = {str(file.relative_to(self.path)): sha256_file(file) for file in files}
        spec = json.dumps(self._product.spec, indent=2, sort_keys=True, ensure_ascii=False)
        atomic.write_bytes(self.path / "spec.json", spec.encode())
        manifest = json.dumps({"files": hashes, **self.facts}, indent=2, ensure_ascii=False)
        atomic.write_bytes(self.path / "manifest.json", manifest.encode())
        if not (self._product.path / "manifest.json").exists():
            atomic.rename(self.path, self._product.path)
