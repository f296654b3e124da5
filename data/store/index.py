"""Where the rows of a table are: a compact index of millions of row keys in numpy arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_TOGETHER = 1 << 16
"""Keys that are looked up together: the memory of a look-up is bounded by them."""

Bytes = NDArray[np.bytes_]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Keys:
    """The row keys of one shard (or of a part of a question), in its order."""

    ids: Bytes
    """Distinct example ids, shape (D,). No id (`rejected` has rows of none) is the empty one."""
    code: Ints
    """Of each row the position of its example id in `ids`, shape (R,)."""
    rest: Words
    """Of each row the rest of its key, shape (R,)."""

    @classmethod
    def of(cls, table: pa.Table | pa.RecordBatch) -> "Keys":
        """Return the keys in a table of key columns, `example_id` first."""
        column = pc.fill_null(_one_array(table.column(0)), "").dictionary_encode()
        return cls(
            _fixed_width(column.dictionary),
            column.indices.to_numpy().astype(np.int64),
            _rest([_one_array(part) for part in table.columns[1:]], table.num_rows),
        )


@dataclass(frozen=True, eq=False)
class Index:
    """The places of all rows of a table: 16 bytes a row, and once each example id with 8 bytes.

    Rows are sorted by example, rest of the key, shard. A key in several shards has several rows, and the first one
    wins: the row in the shard with the smallest name.
    """

    shards: Sequence[str]
    """Names, sorted."""
    ids: Bytes
    """Distinct example ids, sorted, shape (E,)."""
    starts: Ints
    """Where the rows of each example begin, and where those of the last one end, shape (E + 1,)."""
    rest: Words
    """Of each row the rest of its key, shape (N,)."""
    shard: NDArray[np.int32]
    """Of each row the number of its shard in `shards`, shape (N,)."""
    row: NDArray[np.int32]
    """Of each row its position in its shard, shape (N,)."""

    @classmethod
    def empty(cls) -> "Index":
        """Return an index of no rows."""
        none = np.empty(0, np.int32)
        return cls((), np.empty(0, "S8"), np.zeros(1, np.int64), np.empty(0, np.uint64), none, none)

    def num_keys(self) -> int:
        """Return the number of distinct keys."""
        new = np.ones(len(self.rest), np.bool_)
        new[1:] = self.rest[1:] != self.rest[:-1]
        new[self.starts[:-1][np.diff(self.starts) > 0]] = True  # equal rests of different examples
        return int(np.count_nonzero(new))

    def contains(self, keys: pa.Table) -> NDArray[np.bool_]:
        """Return which of these keys (a table of the key columns) are recorded, shape (R,)."""
        found = np.zeros(keys.num_rows, np.bool_)
        start = 0
        for batch in keys.to_batches(max_chunksize=_TOGETHER) if len(self.rest) else ():
            asked = Keys.of(batch)
            code = self._codes(asked.ids)[asked.code]
            at = self._lower_bound(code, asked.rest)
            there = (at < self._ends(code)) & (self.rest[_clipped(at, self.rest)] == asked.rest)
            found[start : start + len(there)] = there
            start += len(there)
        return found

    def has_samples(self, example_ids: pa.ChunkedArray, n: int) -> NDArray[np.bool_]:
        """Return which of the first n samples are recorded, for tables keyed by sample, shape (E, n)."""
        found = np.zeros((len(example_ids), n), np.bool_)
        for start in range(0, len(example_ids), _TOGETHER):
            which, at = self.rows_of(example_ids.slice(start, _TOGETHER))
            below = self.rest[at] < n
            found[start + which[below], self.rest[at[below]].astype(np.int64)] = True
        return found

    def rows_of(self, example_ids: pa.ChunkedArray) -> tuple[Ints, Ints]:
        """Return all rows of these examples, in the order given, then by the rest of the key; of equal keys the first.

        Returns:
            For each row which of `example_ids` it belongs to, and its position in the arrays of the index.
        """
        asked = Keys.of(pa.table([example_ids], ["example_id"]))
        code = self._codes(asked.ids)[asked.code]
        start = self._starts(code)
        count = self._ends(code) - start
        which = np.repeat(np.arange(len(code)), count)
        at = np.arange(len(which)) + np.repeat(start - (np.cumsum(count) - count), count)
        first = np.ones(len(at), np.bool_)
        first[1:] = (which[1:] != which[:-1]) | (self.rest[at[1:]] != self.rest[at[:-1]])
        return which[first], at[first]

    def without(self, names: set[str]) -> "Index":
        """Return the index without these shards."""
        keep = np.array([name not in names for name in self.shards], np.bool_)
        kept = keep[self.shard]
        before = np.concatenate([[0], np.cumsum(kept)])
        return Index(
            [name for name in self.shards if name not in names],
            self.ids,  # those that have no row left do no harm
            before[self.starts],
            self.rest[kept],
            (np.cumsum(keep) - 1).astype(np.int32)[self.shard[kept]],
            self.row[kept],
        )

    def merged(self, added: Mapping[str, Keys]) -> "Index":
        """Return the index with these shards as well.

        The added rows are sorted; then each array is merged in one pass. So the cost is a copy of the index, and who
        has many shards to add adds them together.
        """
        names = sorted(added)
        new = [added[name] for name in names]
        shards = sorted([*self.shards, *names])
        number = {name: position for position, name in enumerate(shards)}
        distinct, place = np.unique(np.concatenate([keys.ids for keys in new]), return_inverse=True)
        unknown = distinct[self._codes(distinct) < 0]
        ids = self.ids.astype(np.promote_types(self.ids.dtype, distinct.dtype), copy=False)
        ids = np.insert(ids, np.searchsorted(ids, unknown), unknown)

        offsets = np.cumsum([0, *(len(keys.ids) for keys in new)])
        places = np.concatenate([place[offset + keys.code] for keys, offset in zip(new, offsets, strict=False)])
        code = np.searchsorted(ids, distinct)[places]
        rest = np.concatenate([keys.rest for keys in new])
        sizes = [len(keys.rest) for keys in new]
        shard = np.repeat(np.array([number[name] for name in names], np.int32), sizes)
        row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        order = np.lexsort((rest, code))  # stable: of equal keys the one in the earlier shard stays first
        code, rest, shard, row = code[order], rest[order], shard[order], row[order]

        counts = np.zeros(len(ids), np.int64)
        counts[np.searchsorted(ids, self.ids)] = np.diff(self.starts)
        renumbered = np.array([number[name] for name in self.shards], np.int32)[self.shard]
        old = Index(shards, ids, _running(counts), self.rest, renumbered, self.row)
        at = old._lower_bound(code, rest, shard)
        return Index(
            shards,
            ids,
            _running(counts + np.bincount(code, minlength=len(ids))),
            np.insert(old.rest, at, rest),
            np.insert(old.shard, at, shard),
            np.insert(old.row, at, row),
        )

    def _codes(self, ids: Bytes) -> Ints:
        """Return positions of example ids in `ids`; −1 for those that are missing."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = _clipped(np.searchsorted(self.ids, ids), self.ids)
        return np.where(self.ids[at] == ids, at, -1)

    def _starts(self, code: Ints) -> Ints:
        return np.where(code < 0, 0, self.starts[code])

    def _ends(self, code: Ints) -> Ints:
        return np.where(code < 0, 0, self.starts[code + 1])

    def _lower_bound(self, code: Ints, rest: Words, shard: Any = 0) -> Ints:
        """Return the first rows that do not come before (code, rest, shard), by one vectorized binary search."""
        low, high = self._starts(code), self._ends(code)
        while (searching := low < high).any():
            middle = np.where(searching, (low + high) // 2, 0)
            there = self.rest[middle]
            before = (there < rest) | ((there == rest) & (self.shard[middle] < shard))
            low = np.where(searching & before, middle + 1, low)
            high = np.where(searching & ~before, middle, high)
        return low


def _clipped(positions: Ints, array: NDArray[Any]) -> Ints:
    """Return positions that may be one past the end of an array as positions in it."""
    return np.minimum(positions, len(array) - 1)


def _running(counts: Ints) -> Ints:
    """Return where each of consecutive groups of these sizes begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _fixed_width(strings: pa.Array) -> Bytes:
    """Return strings as UTF-8 in a numpy array whose items have a multiple of 8 bytes."""
    longest = pc.max(pc.binary_length(strings)).as_py() or 1
    width = -(-longest // 8) * 8
    padded = pc.ascii_rpad(strings, width, padding="\0")
    return np.frombuffer(padded.buffers()[2] if len(strings) else b"", f"S{width}", len(strings))


def _rest(columns: Sequence[pa.Array], size: int) -> Words:
    """Return the rest of each key in 64 bits: a sample's number unchanged, anything else hashed.

    A hash may collide, but only rows of one example are ever told apart by it, and of these there are few: among a
    hundred the odds are 1 in 10¹⁵.
    """
    if len(columns) == 1 and pa.types.is_integer(columns[0].type):
        numbers: Words = columns[0].to_numpy().astype(np.uint64)
        return numbers
    hashed = np.zeros(size, np.uint64)
    for column in columns:
        hashed = _mixed(hashed, pc.binary_length(column).to_numpy().astype(np.uint64))
        padded = _fixed_width(column)
        for word in padded.view(np.uint64).reshape(size, padded.itemsize // 8).T:
            # The padding of a string depends on its neighbours, so it must not change the hash.
            hashed = np.where(word, _mixed(hashed, word), hashed)
    return hashed


def _mixed(state: Words, word: Words) -> Words:
    """Return the state of a hash after a word: FNV-1a by words, with a shift that spreads the upper bits."""
    state = state ^ word
    for _ in range(2):
        state = state * np.uint64(0x9E3779B97F4A7C15)
        state = state ^ (state >> np.uint64(32))
    return state
