"""Small shards are merged: nothing is lost, doubled or put in another order, at no instant and for no reader."""

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_pipe.data.store import Rows, shards
from cpo_pipe.data.store.shards import MERGED_BYTES, MERGED_ROWS, SHARD_ROWS, plan_merges
from tests.support.store import Crash, crash_at, keys, row, rows_of, values

EXAMPLES = [f"{number:02d}" for number in range(20)]
Sizes = list[tuple[str, int, int]]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of one row are merged as soon as there are 16."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)


def fill(rows: Rows) -> None:
    """Twenty shards of two rows; the second is one of a later example too, with another value."""
    for number, name in enumerate(EXAMPLES):
        later = EXAMPLES[(number + 3) % len(EXAMPLES)]
        rows.append(pa.Table.from_pylist([row(name, "own", number), row(later, "shared", number)]))


def physical(rows: Rows) -> int:
    return sum(pq.read_metadata(path).num_rows for path in rows.path.glob("shards/*.parquet"))


@pytest.mark.usefixtures("small_limit")
def test_small_shards_are_merged_and_read_as_before(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    fill(rows)
    rows.append(pa.Table.from_pylist([row("00", "own", 99.0), row("late", "own", 99.0)]))  # a duplicate that loses
    before, content = rows.files(), values(rows, *EXAMPLES, "late")
    with rows.lock():
        pass
    for reader in (rows, rows_of(tmp_path)):
        assert values(reader, *EXAMPLES, "late") == content
        assert reader.num_rows() == 41
    assert len(rows.files()) == 6
    assert rows.files()[0].stem.startswith(before[0].stem), "it stands where the first of them stood"
    assert rows.files()[1:] == before[16:]
    assert {path.stem for path in rows.path.glob("shards/*")} == {path.stem for path in rows.files()}
    manifest = json.loads((rows.path / "manifests" / f"{rows.files()[0].stem}.json").read_text())
    assert manifest["rows"] == 32
    assert manifest["merged"] == [path.stem for path in before[:16]]


@pytest.mark.usefixtures("small_limit")
def test_of_equal_rows_in_merged_shards_the_first_stays(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    for number in range(20):
        rows.append(pa.Table.from_pylist([row("a", str(number % 5), number)]))
    with rows.lock():
        pass
    assert values(rows_of(tmp_path), "a") == [("a", str(number), float(number)) for number in range(5)]
    assert physical(rows) == 5 + 4


@pytest.mark.slow
@pytest.mark.usefixtures("small_limit")
def test_interrupted_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, crashed = 0, True
    fill(rows_of(tmp_path / "unmerged"))
    while crashed:
        point += 1
        root = tmp_path / str(point)
        shutil.copytree(tmp_path / "unmerged", root)
        content = values(rows_of(root), *EXAMPLES)
        with monkeypatch.context() as patch:
            crash_at(patch, point)
            try:
                rows_of(root).compact()
                crashed = False
            except Crash:
                pass
        assert values(rows_of(root), *EXAMPLES) == content
        with rows_of(root).lock():
            pass
        after = rows_of(root)
        assert values(after, *EXAMPLES) == content
        assert physical(after) == after.num_rows() == 40, "the next writer finishes what a dead one began"
        assert len(after.files()) == 5
        assert not list(after.path.rglob(".tmp-*"))
        assert not (after.path / "damaged").exists()
    assert point > 40, "the loop must really have passed through the removal of each manifest and file"


@pytest.mark.usefixtures("small_limit")
def test_readers_with_an_older_index_survive(tmp_path: Path) -> None:
    fill(rows_of(tmp_path))
    content = values(rows_of(tmp_path), *EXAMPLES)
    reader, slices = rows_of(tmp_path), rows_of(tmp_path)
    assert reader.num_rows() == 40
    iterator = slices.batches(EXAMPLES, size=5)
    first = next(iterator)
    with rows_of(tmp_path).lock():
        pass
    found = pa.concat_tables([first, *iterator])
    for table in (found, reader.read(EXAMPLES, refresh=False)):
        columns = (table[name].to_pylist() for name in ("example_id", "candidate_id", "logprob"))
        assert list(zip(*columns, strict=True)) == content
    assert reader.contains(keys(("00", "own"), ("00", "other")), refresh=False).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.usefixtures("small_limit")
def test_readers_at_the_same_time_see_every_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(tmp_path)
    counts: set[int] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            fresh = rows_of(tmp_path)
            counts.add(fresh.num_rows())
            counts.add(fresh.read(EXAMPLES).num_rows)

    fill(rows)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for generation in range(6):
        for number in range(16):  # nothing new, but always something to merge
            rows.append(pa.Table.from_pylist([row(EXAMPLES[number], "own", generation)]))
        rows.compact()
    done.set()
    for reader in readers:
        reader.join()
    assert counts == {40}
    assert "damaged" not in caplog.text


def merged(shards: Sizes, merges: Sequence[Sequence[str]]) -> Sizes:
    """What stands there after `merges`, each of neighbours."""
    sizes = {name: (rows, size) for name, rows, size in shards}
    names = list(sizes)
    for group in merges:
        start = names.index(group[0])
        assert names[start : start + len(group)] == list(group), "only neighbours are merged"
        names[start : start + len(group)] = [group[0]]
        rows, size = zip(*(sizes[name] for name in group), strict=True)
        sizes[group[0]] = (sum(rows), sum(size))
    return [(name, *sizes[name]) for name in names]


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 10, 100, 1000, 9000]), st.integers(1, 50))
def test_no_row_is_written_often_and_few_shards_remain(random: object, largest: int, together: int) -> None:
    shards: Sizes = []
    written: dict[str, int] = {}  # merges of the row that was merged most often, by shard
    total = 0
    for number in range(600):
        rows = random.randint(1, largest)  # type: ignore[attr-defined]
        shards.append((f"{number:04d}", rows, 40 * rows))
        total += rows
        if number % together == 0:
            for group in (merges := plan_merges(shards)):
                written[group[0]] = max(written.get(name, 0) for name in group) + 1
                assert sum(rows for name, rows, _ in shards if name in group) <= MERGED_ROWS + SHARD_ROWS
            shards = merged(shards, merges)
            assert not plan_merges(shards), "what was merged is not merged again at once"
    assert max(written.values(), default=0) <= 3
    assert len(shards) - together <= 2 * total / SHARD_ROWS + 120


def test_memory_of_a_merge_is_bounded() -> None:
    shards = [(f"{number:04d}", 5, MERGED_BYTES // 3 + 1) for number in range(100)]
    assert max(map(len, plan_merges(shards))) == 3
    large = [(f"{number:04d}", 5, MERGED_BYTES // 2) for number in range(100)]
    assert not plan_merges(large), "a large file is not small, however few its rows"


def test_an_ordinary_store_is_left_alone() -> None:
    assert not plan_merges([(f"{number:04d}", SHARD_ROWS, 1 << 20) for number in range(100)])
    assert not plan_merges([(f"{number:04d}", 100, 1 << 14) for number in range(15)])
