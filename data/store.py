"""The artifact store: row tables that only grow, and whole products, addressed by what decides their values.

    <root>/<kind>/<address>/spec.json         the readable spec whose hash is the address
    <root>/<kind>/<address>/shards/*.parquet  rows, in shards that never change; small ones are merged into new ones
    <root>/<kind>/<address>/manifests/*.json  one per shard, written last: a shard without one does not exist
    <root>/<kind>/<address>/damaged/          shards set aside because they no longer match their manifest
    <root>/<kind>/<address>/manifest.json     of a whole product (a folder of files), with each file's hash
    <root>/.runs/*.json                       what each run folder asked for

The root is a folder or a URL of an object store. Killed at any instant, a writer loses at most the shard in flight; a
reader never sees half of anything.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cpo_pipe.data import atomic
from cpo_pipe.data.errors import InputError, RunError, cause
from cpo_pipe.data.fingerprint import FileHashes, Spec, address, digest, sha256_file, sha256_once
from cpo_pipe.data.index import Index, Keys
from cpo_pipe.data.records import product_manifest, read_record, registration, shard_manifest, with_checksum
from cpo_pipe.data.roots import AnyPath, local_folder, open_root, reported, shown
from cpo_pipe.data.schemas import TABLES

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger(__name__)

SHARD_ROWS = 8192
SHARD_SECONDS = 30.0

MERGED_SHARDS = 16
"""Small neighbouring shards are merged when there are this many."""
MERGED_ROWS = 4 * SHARD_ROWS
MERGED_BYTES = 16 << 20
"""A merge takes no more once it has this many rows, or bytes of files: it is done in memory."""

_ARTIFACT = b"cpo_pipe.artifact"
"""Key of a shard's metadata: whose shard it is."""
_CHECKSUM_IN_NAME = 8
"""Digits of a shard's checksum at the end of its name."""
_INDEXED_TOGETHER = 1 << 21
"""Row keys that are added to the index at once."""
_REQUESTS = 8
"""Files that are read at the same time: an object store answers each in tens of milliseconds."""


class Store:
    """Artifacts shared by all runs that point to them.

    Args:
        root: a folder, or a URL that fsspec knows: with the extra `s3` such as s3://bucket/prefix. Credentials and
            endpoint come from the environment (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or a
            profile), on every machine that opens the store.

    On a remote root one put is complete or absent, and the put of the manifest commits. There is no lock between
    machines: two may do the same work, and of rows that stand twice the first stays. Whole products are files on this
    machine, uploaded when they are made and downloaded when they are first asked for.

    Raises:
        InputError: the root cannot be made or reached.
    """

    def __init__(self, root: str | Path):
        self.root = open_root(root)
        self.local = local_folder(self.root)
        """Where whole products are on this machine; a local root itself."""
        self.local.mkdir(parents=True, exist_ok=True)
        self.used: set[str] = set()
        """Names of the artifacts that were asked for."""
        self._run_dir: Path | None = None
        self.hash_file = FileHashes(self.local / "file-hashes.json", atomic.write_bytes)
        self._rows: dict[str, Rows] = {}

    @property
    def name(self) -> str:
        """The root as records name it."""
        return shown(self.root)

    def rows(self, kind: str, spec: Spec) -> "Rows":
        """The growing table of this kind and spec; nothing is written until rows are."""
        name = self._name(kind, spec)
        if name not in self._rows:
            self._rows[name] = Rows(self.root / name, kind, spec, self.local / name)
        return self._rows[name]

    def product(self, kind: str, spec: Spec) -> "Product":
        """The whole product (a folder of files) of this kind and spec, made or not."""
        name = self._name(kind, spec)
        remote = None if isinstance(self.root, Path) else self.root / name
        return Product(self.local / name, spec, self.hash_file, remote)

    def register_run(self, run_dir: Path) -> None:
        """Note that a run needs what was asked for and, from now on, what will be: no cleaning removes it.

        Recorded in <root>/.runs, one file per run folder and machine, before anything is made or read.
        """
        self._run_dir = run_dir.absolute()
        self._register()

    def _register(self) -> None:
        run = {"run_dir": str(self._run_dir), "host": socket.gethostname()}
        path = self.root / ".runs" / f"{digest(run)}.json"
        if isinstance(self.root, Path) and not os.access(self.root, os.W_OK):
            return  # a store that one may only read: all must be there, and nobody here can clean it
        with _locked(self.local / ".locks" / "runs", "the list of runs"):  # two commands may be in one folder
            known = registration(path)
            if known is None and path.exists():
                log.warning("%s is damaged; written again with what this run uses. `cpo-pipe store gc` no longer knows "
                            "what its folder used before with other settings", path)  # fmt: skip
            before = known.artifacts if known is not None else frozenset()
            if known is None or not self.used <= before:
                content = {**run, "artifacts": sorted(before | self.used)}
                atomic.write_bytes(path, json.dumps(content, indent=2).encode())

    def _name(self, kind: str, spec: Spec) -> str:
        name = f"{kind}/{address(spec)}"
        if name not in self.used:
            self.used.add(name)
            if self._run_dir is not None:
                self._register()
        return name


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
    """A table of rows identified by a key, grown shard by shard; made by `Store.rows`.

    Cheap to pickle: what it knows of the shards stays behind.
    """

    def __init__(self, path: AnyPath, kind: str, spec: Spec, local: Path):
        self.path = path
        self.kind = kind
        self.spec = spec
        self.schema = TABLES[kind].schema
        self.key = TABLES[kind].key
        self.local = local
        """Its folder on this machine, for the lock and for scratch; `path` itself in a local store."""
        self._is_described = False
        self._index = Index.empty()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._last: tuple[str, list[str], pa.Table] | None = None

    def __reduce__(self) -> tuple[Callable[..., "Rows"], tuple[str, str, Spec]]:
        root = self.path.parents[1]
        return _reopened, (str(root.absolute() if isinstance(root, Path) else root), self.kind, self.spec)

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.kind}/{self.path.name}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making missing rows, so that two processes of a machine do not do the same work."""
        with _locked(self.local, self.name):
            for shard in self.local.glob("shards/*.parquet"):  # of a remote root another machine may be writing one
                if not self._manifest_path(shard.stem).exists():
                    shard.unlink()  # its writer died before it was recorded
            for scratch in self.local.rglob(".tmp-*"):
                scratch.unlink()
            for worklist in self.local.glob("worklist-*"):  # what an executor handed to its workers
                shutil.rmtree(worklist)
            self.compact()  # what one left that was stopped
            yield
            self.compact()

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
            raise RunError(f"{self.name}: rows do not fit the schema ({cause(error)})") from error
        if _first_of_each(table, self.key).num_rows != table.num_rows:
            raise RunError(f"{self.name}: the same row key stands twice in one shard")
        if not self._is_described:  # once in each process, whether it is there or not
            atomic.write_bytes(self.path / "spec.json", _spec_text(self.spec))
            self._is_described = True
        # Names order by time, so that a row that was ever read stays the one that wins over a later duplicate.
        self._record(f"{time.time_ns():019d}", table, {})

    def _record(self, place: str, table: pa.Table, facts: Mapping[str, Any]) -> None:
        """Write a shard, then its manifest; the shard's name begins with `place`."""
        sink = pa.BufferOutputStream()
        metadata = {**(table.schema.metadata or {}), _ARTIFACT: self.name}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        checksum = hashlib.sha256(content).hexdigest()
        name = f"{place}-{checksum[:_CHECKSUM_IN_NAME]}"
        atomic.write_bytes(self._shard_path(name), content)
        self._write_manifest(name, table, content, facts)

    def _write_manifest(self, name: str, keys: pa.Table, content: bytes, facts: Mapping[str, Any]) -> None:
        ids = keys["example_id"]
        manifest = {
            "rows": keys.num_rows,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "example_ids": [pc.min(ids).as_py(), pc.max(ids).as_py()],
            **facts,
        }
        atomic.write_bytes(self._manifest_path(name), json.dumps(manifest).encode())

    def compact(self) -> None:
        """Merge small shards that are neighbours by name; called with the lock held, as at the end of `lock`.

        A merged shard is recorded before those that it replaces are removed, and its name sorts where the first of them
        stood. So nothing is lost or doubled at any instant, and of equal rows the same one stays the first.
        """
        self._finish_merges()
        shards = [(name, *self._sizes[name]) for name in self._refreshed().shards]
        for names in _to_merge(shards):
            try:
                table = pa.concat_tables(_together(self._read_shard, names))
            except FileNotFoundError:  # merged by another machine
                continue
            self._record(names[0], _first_of_each(table, self.key), {"merged": names})
            self._remove(names)

    def _finish_merges(self) -> None:
        """Remove what an interrupted merge left: the first of the merged shards, which goes last, and maybe others."""
        names = self._refreshed().shards
        for first, name in pairwise(names):
            if name.startswith(f"{first}-"):
                manifest = shard_manifest(self._manifest_path(name)) or {}
                self._remove(manifest.get("merged", [first]))  # the list is lost where the manifest was made again

    def _remove(self, names: Sequence[str]) -> None:
        first, *others = map(self._manifest_path, names)
        _unlink(others)
        _unlink([first])
        if isinstance(first, Path):
            atomic.sync(first.parent)  # a manifest without its shard would be damage
        _unlink(map(self._shard_path, names))

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

    def contains(self, keys: pa.Table, *, refresh: bool = True) -> NDArray[np.bool_]:
        """Which of these row keys (a table of the key columns, R rows) are recorded, shape (R,).

        Without `refresh` shards that were recorded since the last look are not seen.
        """
        return self._current(refresh).contains(keys.select(list(self.key)).cast(self._key_schema()))

    def has_samples(self, example_ids: pa.ChunkedArray | pa.Array | Sequence[str], n: int) -> NDArray[np.bool_]:
        """Which of the samples 0 to n − 1 of each example are recorded, shape (E, n); of tables keyed by sample."""
        return self._refreshed().has_samples(_strings(example_ids), n)

    def missing(self, wanted: pa.Table) -> pa.Table:
        """Those of the `wanted` row keys (a table of the key columns) that are not recorded, in the same order."""
        wanted = wanted.select(list(self.key)).cast(self._key_schema())
        return wanted.filter(pa.array(~self.contains(wanted)))

    def read(
        self,
        example_ids: pa.ChunkedArray | Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        refresh: bool = True,
    ) -> pa.Table:
        """All rows of these examples, in the order given, then by the rest of the row key.

        Reads only the shards that hold them. Examples without rows are simply not there: ask `missing` first. Without
        `refresh` shards that were recorded since the last look are not seen.
        """
        ids, names = _strings(example_ids), self.schema.names if columns is None else list(columns)
        try:
            return self._read(self._current(refresh), ids, names)
        except FileNotFoundError:  # merged since the index was made
            return self._read(self._refreshed(), ids, names)

    def _read(self, index: Index, example_ids: pa.ChunkedArray, names: list[str]) -> pa.Table:
        which, at = index.rows_of(example_ids)
        if not len(at):
            return pa.schema([self.schema.field(name) for name in names]).empty_table()
        by_shard = np.argsort(index.shard[at], kind="stable")
        which, at = which[by_shard], at[by_shard]
        shard, row = index.shard[at], index.row[at]
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1), len(shard)]
        parts = []
        for start, end in pairwise(bounds):
            table = self._read_shard(index.shards[shard[start]], list(dict.fromkeys([*names, *self.key[1:]])))
            part = table.take(pa.array(row[start:end]))
            parts.append(part.append_column("_which", pa.array(which[start:end])))
        order = [(name, "ascending") for name in ("_which", *self.key[1:])]
        return pa.concat_tables(parts).sort_by(order).select(names)

    def batches(
        self, example_ids: pa.ChunkedArray | Sequence[str], size: int = 1024, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """`read` in slices of `size` examples, so that memory is bounded by a slice and a shard."""
        for start in range(0, len(example_ids), size):
            yield self.read(example_ids[start : start + size], columns, refresh=start == 0)

    def files(self) -> list[AnyPath]:
        """The recorded shards."""
        return [self._shard_path(name) for name in self._refreshed().shards]

    def num_rows(self) -> int:
        """Recorded rows, duplicates counted once."""
        return self._refreshed().num_keys()

    def _shard_path(self, name: str) -> AnyPath:
        return self.path / "shards" / f"{name}.parquet"

    def _manifest_path(self, name: str) -> AnyPath:
        return self.path / "manifests" / f"{name}.json"

    def _key_schema(self) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in self.key])

    def _read_shard(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Columns of a shard. The last one is kept: where a slice ends, the next begins.

        Raises:
            FileNotFoundError: it was merged with others.
        """
        columns = columns or self.schema.names
        last = self._last
        if last is None or last[:2] != (name, columns):
            path = self._shard_path(name)
            source = path if isinstance(path, Path) else pa.BufferReader(path.read_bytes())
            with pq.ParquetFile(source) as file:
                last = self._last = (name, columns, file.read(columns).select(columns))
        return last[2]

    def _current(self, refresh: bool) -> Index:
        return self._refreshed() if refresh or not self._index.shards else self._index

    def _refreshed(self) -> Index:
        """The index, brought up to date with the folder.

        Done when the folder lists what is indexed. So a listing from the middle of a merge, which may show neither the
        old shards nor the new one, does no harm: the next shows the new one.
        """
        while (recorded := self._recorded()) != (known := set(self._index.shards)):
            if not known and isinstance(self.path, Path) and _spec_owner(self.path) != self.name:
                _write_spec(self.path, self.spec, self.name)
            if known - recorded:
                self._index = self._index.without(known - recorded)
            self._add_to_index(sorted(recorded - known))
        return self._index

    def _recorded(self) -> set[str]:
        """Names of the shards that have a manifest."""
        folder = self.path / "manifests"
        try:
            # Asked before every look-up, and much faster than `glob`.
            files = os.listdir(folder) if isinstance(folder, Path) else folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return set()
        names = (file.rpartition("/")[2] for file in files)
        return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}

    def _add_to_index(self, names: list[str]) -> None:
        pending: dict[str, Keys] = {}
        count = 0
        for name, keys in zip(names, _together(self._keys_of, names), strict=True):
            if keys is not None:
                pending[name] = keys
                count += len(keys.rest)
            if count >= _INDEXED_TOGETHER or (pending and name == names[-1]):
                self._index, pending, count = self._index.merged(pending), {}, 0

    def _keys_of(self, name: str) -> Keys | None:
        """The keys in a shard, if it still is what its manifest says; one that is not is named and set aside.

        A damaged manifest is made again from a shard that still has the checksum in its name.
        """
        shard, manifest_path = self._shard_path(name), self._manifest_path(name)
        try:
            content = shard.read_bytes()
        except FileNotFoundError:
            if not manifest_path.exists():  # another process has just set it aside, or merged it
                return None
            fault: str | None = "its file is gone"
        else:
            manifest = shard_manifest(manifest_path)
            if manifest is None and not manifest_path.exists():
                return None
            keys, fault = self._checked(name, content, manifest)
            if keys is not None:
                if manifest is None:
                    log.warning("%s: the manifest of shard %s was damaged; made again", self.name, name)
                    self._write_manifest(name, keys, content, {})
                self._sizes[name] = keys.num_rows, len(content)
                return Keys.of(keys)
        damaged = self.path / "damaged"
        if isinstance(damaged, Path):
            damaged.mkdir(exist_ok=True)
        for path in (manifest_path, shard):
            with suppress(FileNotFoundError):  # two readers may find the same damage
                path.rename(damaged / path.name)  # type: ignore[arg-type]  # both local or both remote
        log.warning("%s: shard %s is damaged (%s); set aside in %s; its rows will be made again",
                    self.name, name, fault, shown(damaged))  # fmt: skip
        return None

    def _checked(
        self, name: str, content: bytes, manifest: Mapping[str, Any] | None
    ) -> tuple[pa.Table | None, str | None]:
        """The key columns of a shard, or what is wrong with it."""
        checksum = hashlib.sha256(content).hexdigest()
        if manifest is None:
            if checksum[:_CHECKSUM_IN_NAME] != name.rpartition("-")[2]:
                return None, "its manifest is unreadable, and its checksum is not that of its name"
        elif len(content) != manifest["bytes"]:
            return None, f"it has {len(content)} bytes instead of {manifest['bytes']}"
        elif checksum != manifest["sha256"]:
            return None, "its checksum differs"
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            if fault := foreign(file, self.name):
                return None, fault
            if manifest is not None and file.metadata.num_rows != manifest["rows"]:
                return None, f"it has {file.metadata.num_rows} rows instead of {manifest['rows']}"
            return file.read(list(self.key)).select(list(self.key)).cast(self._key_schema()), None


def foreign(shard: pq.ParquetFile, artifact: str) -> str | None:
    """Return what to say of a shard that was written for another artifact."""
    owner = (shard.schema_arrow.metadata or {}).get(_ARTIFACT, artifact.encode()).decode()
    return None if owner == artifact else f"it is a shard of {owner}"


def _spec_text(spec: Spec) -> bytes:
    return json.dumps(spec, indent=2, sort_keys=True, ensure_ascii=False).encode()


def _spec_owner(folder: Path) -> str | None:
    """Return the name of the artifact whose spec is in the folder; None where the spec is gone or damaged."""
    spec = read_record(folder / "spec.json")
    return None if spec is None else f"{folder.parent.name}/{address(spec)}"


def _write_spec(folder: Path, spec: Spec, name: str) -> None:
    """Make a damaged spec.json again: whoever asks for the artifact knows its spec."""
    if os.access(folder, os.W_OK):
        log.warning("%s: spec.json was gone or damaged; made again", name)
        atomic.write_bytes(folder / "spec.json", _spec_text(spec))


def _reopened(root: str, kind: str, spec: Spec) -> Rows:
    return Store(root).rows(kind, spec)


def _strings(values: pa.ChunkedArray | pa.Array | Sequence[str]) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        return values
    return pa.chunked_array([values if isinstance(values, pa.Array) else pa.array(values, pa.string())])


def _first_of_each(table: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows of `table` whose key was not seen before them."""
    numbered = table.select(list(key)).append_column("_position", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(list(key)).aggregate([("_position", "min")])["_position_min"]
    return table if len(first) == table.num_rows else table.take(np.sort(first.to_numpy()))


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def _together(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Results in order, several at a time."""
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _unlink(paths: Iterable[AnyPath]) -> None:
    for _ in _together(lambda path: path.unlink(missing_ok=True), paths):
        pass


def _to_merge(shards: Sequence[tuple[str, int, int]]) -> list[list[str]]:
    """Which shards to merge, given name, rows and bytes of each in the order of names.

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
    """A folder of files that is complete or absent (a checkpoint, prepared examples, …); made by `Store.product`.

    Of a remote store `path` is this machine's copy.
    """

    def __init__(self, path: Path, spec: Spec, hash_file: FileHashes, remote: "UPath | None" = None):
        self.path = path
        self.spec = spec
        self._hash_file = hash_file
        self._remote = remote

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def manifest(self) -> dict[str, Any]:
        """What `create` recorded: the files with their hashes, and the caller's facts."""
        content = product_manifest(self.path / "manifest.json")
        if content is None:
            raise RunError(f"{self.path / 'manifest.json'}: damaged; run the command again to make {self.name} again")
        return content

    @property
    def in_progress(self) -> Path:
        """Where what makes it keeps its unfinished state, on this machine."""
        return self.path.parent / ".in-progress" / self.path.name

    @property
    def _locks(self) -> Path:
        return self.path.parent / ".locks" / self.path.name

    def complete(self) -> bool:
        """Whether it is there and undamaged. From a remote store it is downloaded where this machine lacks it."""
        if self._remote is not None:
            return self._downloaded(self._remote)
        return self.path.exists() and self._is_undamaged()

    def _is_undamaged(self) -> bool:
        broken = self._broken()
        if broken is not None:
            log.warning("%s is damaged (%s); it will be set aside and made again", self.name, broken)
        return broken is None

    def _broken(self) -> str | None:
        """The first file that is not what the manifest says."""
        manifest = product_manifest(self.path / "manifest.json")
        if manifest is None:
            return "manifest.json"
        owner = manifest.get("artifact") or _spec_owner(self.path) or self.name
        if owner != self.name:
            return f"its files are those of {owner}"
        if _spec_owner(self.path) != self.name:
            _write_spec(self.path, self.spec, self.name)
        return next((name for name, sha256 in manifest["files"].items() if not self._is_sound(name, sha256)), None)

    def _is_sound(self, name: str, sha256: str) -> bool:
        file = self.path / name
        # A run with nothing to do reads all files but the weights, which `Model.check_weights` reads before their use.
        hash_file = self._hash_file if file.suffix == ".safetensors" else sha256_once
        return file.is_file() and hash_file(file) == sha256

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making it, so that two processes of a machine do not do the same. Sets a damaged one aside."""
        with _locked(self._locks, self.name):
            for leftover in self.path.parent.glob(f".tmp-*-{self.path.name}"):
                shutil.rmtree(leftover)
            remote = self._remote and self._remote / "manifest.json"
            if remote is not None and remote.exists() and not self.complete():
                remote.unlink()
            if self.path.exists() and self._broken() is not None:
                self.path.replace(self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}"))
            if self._remote is not None and self.path.exists():
                self._upload(self._remote)  # its maker may have been killed before it had
            yield

    def create(self) -> "ProductWriter":
        """A context that yields an empty folder; on success it becomes the product, on any error it is removed."""
        return ProductWriter(self)

    def commit(self, folder: Path) -> None:
        """Make it of a folder that is finished, for `ProductWriter`."""
        if not (self.path / "manifest.json").exists():
            atomic.rename(folder, self.path)
        if self._remote is not None:
            self._upload(self._remote)

    def _upload(self, remote: "UPath") -> None:
        if (remote / "manifest.json").exists():  # made on another machine meanwhile
            return
        with reported(remote):
            for name in ("spec.json", *self.manifest["files"]):
                remote.fs.put_file(str(self.path / name), (remote / name).path)
        atomic.write_bytes(remote / "manifest.json", (self.path / "manifest.json").read_bytes())

    def _downloaded(self, remote: "UPath") -> bool:
        """Bring this machine's copy to what is recorded over there; whether there is anything, and undamaged."""
        try:
            recorded = (remote / "manifest.json").read_bytes()
        except FileNotFoundError:
            return False
        own = self.path / "manifest.json"
        with _locked(self._locks / "download", f"the copy of {self.name}"):
            if own.exists() and own.read_bytes() == recorded and self._broken() is None:
                return True
            scratch = self.path.with_name(f".download-{self.path.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            self._download(remote, recorded, scratch)
            shutil.rmtree(self.path, ignore_errors=True)
            atomic.rename(scratch, self.path)
            return self._is_undamaged()

    def _download(self, remote: "UPath", recorded: bytes, folder: Path) -> None:
        """What is missing over there is missing in `folder` too."""
        atomic.write_bytes(folder / "manifest.json", recorded)
        manifest = product_manifest(folder / "manifest.json") or {"files": {}}
        for name in ("spec.json", *manifest["files"]):
            target = folder / name
            if target.resolve().is_relative_to(folder.resolve()):  # a manifest does not decide where else to write
                target.parent.mkdir(parents=True, exist_ok=True)
                with reported(remote), suppress(FileNotFoundError):
                    remote.fs.get_file((remote / name).path, str(target))


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
        atomic.write_bytes(self.path / "spec.json", _spec_text(self._product.spec))
        manifest = json.dumps(
            with_checksum({"artifact": self._product.name, "files": hashes, **self.facts}), indent=2, ensure_ascii=False
        )
        atomic.write_bytes(self.path / "manifest.json", manifest.encode())
        self._product.commit(self.path)
