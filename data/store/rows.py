"""Row tables that only grow, shard by shard, with the place of each row in memory."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cpo_pipe.data.errors import RunError, cause
from cpo_pipe.data.fingerprint import Spec, content_hash
from cpo_pipe.data.schemas import TABLES
from cpo_pipe.data.store import shards
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.index import Index, Keys
from cpo_pipe.data.store.locks import locked
from cpo_pipe.data.store.paths import AnyPath, in_parallel, local_folder, open_root
from cpo_pipe.data.store.records import shard_manifest

log = logging.getLogger(__name__)

SHARD_SECONDS = 30.0
"""Time after which a shard is written, however few rows it has."""
_INDEXED_TOGETHER = 1 << 21
"""Row keys that are added to the index together."""


def open_rows(root: str | Path, kind: str, spec: Spec) -> "Rows":
    """Return the table of this kind and spec in the store at `root`; nothing is written until rows are.

    Raises:
        InputError: the root cannot be made or reached.
    """
    opened, name = open_root(root), f"{kind}/{content_hash(spec)}"
    return Rows(ArtifactFolder(opened / name, local_folder(opened) / name), spec)


class Rows:
    """A table of rows identified by a key, grown shard by shard; made by `Store.rows`.

    Cheap to pickle: what it knows of the shards stays behind.
    """

    def __init__(self, folder: ArtifactFolder, spec: Spec):
        self.folder = folder
        self.path = folder.path
        self.kind = folder.kind
        self.name = folder.name
        self.spec = spec
        self.schema = TABLES[self.kind].schema
        self.key = TABLES[self.kind].key
        self._is_described = False
        self._index = Index.empty()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._last: tuple[str, list[str], pa.Table] | None = None

    def __reduce__(self) -> tuple[Callable[..., "Rows"], tuple[str, str, Spec]]:
        root = self.path.parents[1]
        return open_rows, (str(root.absolute() if isinstance(root, Path) else root), self.kind, self.spec)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making missing rows, so that two processes of a machine do not do the same work."""
        local = self.folder.local
        with locked(self.folder.lock, self.name):
            for shard in local.glob("shards/*.parquet"):  # of a remote root another machine may be writing one
                if not self.folder.shard_manifest(shard.stem).exists():
                    shard.unlink()  # its writer died before it was recorded
            for scratch in local.rglob(".tmp-*"):
                scratch.unlink()
            for worklist in local.glob("worklist-*"):  # what an executor handed to its workers
                shutil.rmtree(worklist)
            self.compact()  # what one left that was stopped
            yield
            self.compact()

    def append(self, table: pa.Table) -> None:
        """Record `table` as one shard. Complete or absent, also when killed between any two instructions.

        Raises:
            RunError: `table` has a duplicate key, or its columns do not fit the schema.
        """
        if not table.num_rows:
            return
        try:
            table = table.select(self.schema.names).cast(self.schema)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise RunError(f"{self.name}: rows do not fit the schema ({cause(error)})") from error
        if _first_of_each(table, self.key).num_rows != table.num_rows:
            raise RunError(f"{self.name}: duplicate row key in one shard")
        if not self._is_described:  # once in each process, even if it exists
            self.folder.write_spec(self.spec)
            self._is_described = True
        # Names order by time, so that a row that was ever read stays the one that wins over a later duplicate.
        shards.write_shard(self.folder, f"{time.time_ns():019d}", table, {})

    def compact(self) -> None:
        """Merge small shards that are neighbours by name; called with the lock held, as at the end of `lock`.

        A merged shard is recorded before those that it replaces are removed, and its name sorts where the first of them
        stood. So nothing is lost or doubled at any instant, and of equal rows the same one stays the first.
        """
        self._finish_merges()
        sizes = [(name, *self._sizes[name]) for name in self._refreshed().shards]
        for names in shards.plan_merges(sizes):
            try:
                table = pa.concat_tables(in_parallel(self._read_shard, names))
            except FileNotFoundError:  # merged by another machine
                continue
            shards.write_shard(self.folder, names[0], _first_of_each(table, self.key), {"merged": names})
            shards.remove_shards(self.folder, names)

    def _finish_merges(self) -> None:
        """Remove what an interrupted merge left: the first of the merged shards, which goes last, and maybe others."""
        names = self._refreshed().shards
        for first, name in pairwise(names):
            if name.startswith(f"{first}-"):
                manifest = shard_manifest(self.folder.shard_manifest(name)) or {}
                # The list is lost where the manifest was made again.
                shards.remove_shards(self.folder, manifest.get("merged", [first]))

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
        """Return which of these row keys (a table of the key columns, R rows) are recorded, shape (R,).

        Without `refresh` shards that were recorded since the last look are not seen.
        """
        return self._current(refresh).contains(keys.select(list(self.key)).cast(self._key_schema()))

    def has_samples(self, example_ids: pa.ChunkedArray | pa.Array | Sequence[str], n: int) -> NDArray[np.bool_]:
        """Return which of samples 0 to n − 1 of each example are recorded, shape (E, n); for tables keyed by sample."""
        return self._refreshed().has_samples(_strings(example_ids), n)

    def missing(self, wanted: pa.Table) -> pa.Table:
        """Return the `wanted` row keys (a table of the key columns) that are not recorded, in the same order."""
        wanted = wanted.select(list(self.key)).cast(self._key_schema())
        return wanted.filter(pa.array(~self.contains(wanted)))

    def read(
        self,
        example_ids: pa.ChunkedArray | Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        refresh: bool = True,
    ) -> pa.Table:
        """Return all rows of these examples, in the order given, then by the rest of the row key.

        Reads only the shards that hold them. Examples without rows are omitted: ask `missing` first. Without
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
        """Yield what `read` returns in slices of `size` examples, so that memory is bounded by a slice and a shard."""
        for start in range(0, len(example_ids), size):
            yield self.read(example_ids[start : start + size], columns, refresh=start == 0)

    def files(self) -> list[AnyPath]:
        """Return the recorded shards."""
        return [self.folder.shard(name) for name in self._refreshed().shards]

    def num_rows(self) -> int:
        """Return the number of recorded rows; duplicates count once."""
        return self._refreshed().num_keys()

    def _key_schema(self) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in self.key])

    def _read_shard(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return columns of a shard; the last shard read is kept: where a slice ends, the next begins.

        Raises:
            FileNotFoundError: it was merged with others.
        """
        columns = columns or self.schema.names
        last = self._last
        if last is None or last[:2] != (name, columns):
            path = self.folder.shard(name)
            source = path if isinstance(path, Path) else pa.BufferReader(path.read_bytes())
            with pq.ParquetFile(source) as file:
                last = self._last = (name, columns, file.read(columns).select(columns))
        return last[2]

    def _current(self, refresh: bool) -> Index:
        return self._refreshed() if refresh or not self._index.shards else self._index

    def _refreshed(self) -> Index:
        """Return the index, brought up to date with the folder.

        Done when the folder lists what is indexed. So a listing from the middle of a merge, which may show neither the
        old shards nor the new one, does no harm: the next shows the new one.
        """
        while (recorded := self.folder.recorded()) != (known := set(self._index.shards)):
            if not known:
                self.folder.repair_spec(self.spec)
            if known - recorded:
                self._index = self._index.without(known - recorded)
            self._add_to_index(sorted(recorded - known))
        return self._index

    def _add_to_index(self, names: list[str]) -> None:
        pending: dict[str, Keys] = {}
        count = 0
        for name, keys in zip(names, in_parallel(self._keys_of, names), strict=True):
            if keys is not None:
                pending[name] = keys
                count += len(keys.rest)
            if count >= _INDEXED_TOGETHER or (pending and name == names[-1]):
                self._index, pending, count = self._index.merged(pending), {}, 0

    def _keys_of(self, name: str) -> Keys | None:
        """Return the keys in a shard if it still is what its manifest says; quarantine it otherwise.

        A damaged manifest is made again from a shard that still has the checksum in its name.
        """
        manifest_path = self.folder.shard_manifest(name)
        try:
            content = self.folder.shard(name).read_bytes()
        except FileNotFoundError:
            if manifest_path.exists():  # else another process has just quarantined it, or merged it
                shards.quarantine_shard(self.folder, name, "its file is gone")
            return None
        manifest = shard_manifest(manifest_path)
        if manifest is None and not manifest_path.exists():
            return None
        if fault := shards.shard_fault(self.folder, name, content, manifest):
            shards.quarantine_shard(self.folder, name, fault)
            return None
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            keys = file.read(list(self.key)).select(list(self.key)).cast(self._key_schema())
        if manifest is None:
            log.warning("%s: the manifest of shard %s was damaged; made again", self.name, name)
            shards.write_manifest(self.folder, name, keys.num_rows, content)
        self._sizes[name] = keys.num_rows, len(content)
        return Keys.of(keys)


class ShardWriter:
    """Collects rows for `Rows.writer`; a shard is written at 8,192 rows or after 30 seconds, whichever is first."""

    def __init__(self, rows: "Rows", after: "ShardWriter | None" = None):
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
        if self._count >= shards.SHARD_ROWS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one shard."""
        pending, self._pending, self._count = self._pending, [], 0
        self._since = time.monotonic()
        if self._after is not None:
            self._after.flush()
        if pending:
            self._rows.append(pa.concat_tables(pending))


def _strings(values: pa.ChunkedArray | pa.Array | Sequence[str]) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        return values
    return pa.chunked_array([values if isinstance(values, pa.Array) else pa.array(values, pa.string())])


def _first_of_each(table: pa.Table, key: Sequence[str]) -> pa.Table:
    """Return rows of `table` whose key was not seen before them."""
    numbered = table.select(list(key)).append_column("_position", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(list(key)).aggregate([("_position", "min")])["_position_min"]
    return table if len(first) == table.num_rows else table.take(np.sort(first.to_numpy()))
