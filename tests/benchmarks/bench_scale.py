"""The store at 100,000 and at 1,000,000 examples with 11 negatives each: CPU time and memory of what the stages do.

Each negative has 32 token ids and a text of 80 characters, a quarter of what a model writes: what is measured is the
store's own work on 11 million rows, in 1.2 GB of shards. Each scale runs in a process of its own, whose peak of memory
is its own.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.store.shards import SHARD_ROWS

SCALES = (100_000, 1_000_000)
SAMPLES, TOKENS, CHARACTERS, SLICE = 11, 32, 80, 512
SHARD_EXAMPLES = SHARD_ROWS // SAMPLES
PART = 100_000
"""Examples whose keys `missing` is asked for together."""
COLUMNS = ["example_id", "sample_index", "text", "token_ids"]
PEAK_GB = 2.0
LINEAR = 1.2


def bench_scale(tmp_path: Path) -> None:
    reports = []
    for examples in SCALES:
        with_this = [sys.executable, "-m", "tests.benchmarks.bench_scale", str(tmp_path / str(examples)), str(examples)]
        reports.append(json.loads(subprocess.run(with_this, check=True, capture_output=True, text=True).stdout))
    print(f"\nCPU seconds per million rows, {' and '.join(f'{scale:,}' for scale in SCALES)} examples × {SAMPLES}")
    for phase in reports[0]["seconds"]:
        small, large = (report["seconds"][phase] for report in reports)
        print(f"  {phase:35} {small:7.2f} {large:7.2f}   ratio {large / small:.2f}")
    small, large = (sum(report["seconds"].values()) for report in reports)
    print(f"  {'all':35} {small:7.2f} {large:7.2f}   ratio {large / small:.2f}")
    print(f"  {'peak memory, GB':35} {reports[0]['peak']:7.2f} {reports[1]['peak']:7.2f}")
    assert reports[-1]["peak"] < PEAK_GB
    assert large / small < LINEAR


def run(root: Path, examples: int) -> None:
    """Measure one scale and print the figures as JSON."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[phase] = (time.process_time() - start) / (examples * SAMPLES / 1e6)

    ids = example_ids(examples)
    writing = 0.0
    rows = open_rows(root)
    for start in range(0, examples, SHARD_EXAMPLES):
        table = negatives(rows, ids.slice(start, SHARD_EXAMPLES), start)
        before = time.process_time()
        rows.append(table)
        writing += time.process_time() - before
    seconds["write"] = writing / (examples * SAMPLES / 1e6)
    rows = open_rows(root)
    with timed("index (each shard's sum and keys)"):
        assert rows.num_rows() == examples * SAMPLES
    with timed("anti-join: has_samples"):
        assert rows.has_samples(ids, SAMPLES).all()
    with timed("anti-join: missing"):
        for start in range(0, examples, PART):
            part = ids.slice(start, PART)
            keys = pa.table({"example_id": repeated(part), "sample_index": sample_indices(len(part))})
            assert not rows.missing(keys).num_rows
    with timed("rank's join: read by 512 examples"):
        for start in range(0, examples, SLICE):
            part = ids.slice(start, SLICE)
            assert rows.read(part.to_pylist(), COLUMNS, refresh=False).num_rows == len(part) * SAMPLES
    with timed("read everything in batches"):
        assert sum(table.num_rows for table in rows.batches(ids.to_pylist())) == examples * SAMPLES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "peak": peak}))


def open_rows(root: Path) -> Rows:
    """As another process would see them: nothing cached."""
    return Store(root).rows("negatives", {"bench": 1})


def example_ids(count: int) -> pa.Array:
    """Distinct ids of 32 hexadecimal digits in no order, as hashes are."""
    numbers = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return pa.array(np.char.mod("%032x", numbers))


def repeated(ids: pa.Array) -> pa.Array:
    return ids.take(pa.array(np.repeat(np.arange(len(ids)), SAMPLES)))


def sample_indices(examples: int) -> pa.Array:
    return pa.array(np.tile(np.arange(SAMPLES, dtype=np.int32), examples))


def negatives(rows: Rows, ids: pa.Array, seed: int) -> pa.Table:
    """Random negatives of these examples (NEGATIVES schema)."""
    random, count = np.random.default_rng(seed), len(ids) * SAMPLES
    letters = random.integers(97, 123, count * CHARACTERS, dtype=np.uint8)
    lists = pa.array(np.arange(count + 1, dtype=np.int32) * TOKENS)
    constants = {"strategy": "autoregressive", "finish_reason": "stop", "generator": "0" * 32, "engine": "bench"}
    columns: dict[str, object] = {name: pa.repeat(value, count) for name, value in constants.items()}
    columns |= {
        "example_id": repeated(ids),
        "sample_index": sample_indices(len(ids)),
        "text": letters.view(f"S{CHARACTERS}").astype(str),
        "token_ids": pa.ListArray.from_arrays(lists, pa.array(random.integers(0, 50_000, count * TOKENS, np.int32))),
        "logprob": random.normal(-60.0, 20.0, count),
        "seed": random.integers(0, 2**61, count),
    }
    return pa.table({name: columns[name] for name in rows.schema.names}, rows.schema)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
