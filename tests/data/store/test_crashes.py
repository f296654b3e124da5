"""Crashes and kills while rows are written, and two processes that write at once."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.store import Crash, crash_at, keys, row, rows_of, values, write


def test_a_crash_at_any_write_leaves_a_whole_shard_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, crashed = 0, True
    while crashed:
        point += 1
        root = tmp_path / str(point)
        write(rows_of(root), row("old", value=1))
        with monkeypatch.context() as patch:
            crash_at(patch, point)
            try:
                rows_of(root).append(pa.Table.from_pylist([row("a", value=2), row("b", value=2)]))
                crashed = False
            except Crash:
                pass
        after = rows_of(root)
        assert after.num_rows() in (1, 3), "a shard is written whole or not at all"
        assert values(after, "old") == [("old", "c", 1)]
        missing = after.missing(keys(("a", "c"), ("b", "c"))).num_rows
        assert missing in (0, 2)
        write(after, *[row(name, value=2) for name in "ab"][:missing])
        assert values(rows_of(root), "a", "b", "old") == [("a", "c", 2), ("b", "c", 2), ("old", "c", 1)]
        with after.lock():
            leftovers = [path for path in after.path.rglob("*") if path.name.startswith(".tmp")]
        assert not leftovers, "the next writer removes what a dead one left"
    assert point > 8, "the loop passed through the write points"


WORKER = """
import sys, time
from pathlib import Path
from cpo_pipe.data.store import Store
import pyarrow as pa
rows = Store(Path(sys.argv[1])).rows("reference-logprobs", {"model": "m", "dtype": "float32"})
wanted = pa.table({"example_id": [f"{i:04d}" for i in range(300)], "candidate_id": ["c"] * 300})
with rows.lock():
    todo = rows.missing(wanted)["example_id"].to_pylist()
    print("ready", flush=True)
    for start in range(0, len(todo), 4):
        with rows.writer() as writer:
            writer.add([{"example_id": e, "candidate_id": "c", "logprob": float(e), "num_tokens": 1}
                        for e in todo[start:start + 4]])
"""


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    random.seed(0)
    progress = []
    for attempt in range(40):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < 5:
            time.sleep(random.uniform(0.01, 0.15))
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        progress.append(rows_of(tmp_path).num_rows())
        if progress[-1] == 300:
            break
    assert progress == sorted(progress), "no row is lost"
    assert progress[-1] == 300
    rows = rows_of(tmp_path)
    with rows.lock():
        pass  # the last process may have been killed while it merged shards; this lock completes the merge
    assert sum(pq.read_metadata(path).num_rows for path in rows.files()) == 300, "no row is duplicated"
    everyone = [f"{i:04d}" for i in range(300)]
    assert values(rows, *everyone) == [(name, "c", float(name)) for name in everyone]


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    rows = rows_of(tmp_path)
    assert sum(pq.read_metadata(path).num_rows for path in rows.files()) == rows.num_rows() == 300
