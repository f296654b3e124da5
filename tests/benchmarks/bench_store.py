"""The store's anti-join and ordered read, against the same over Python sets and dictionaries."""

import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.store import Store

EXAMPLES, SAMPLES, PAIRS = 20_000, 11, 3


def bench_missing_and_read(tmp_path: Path) -> None:
    rows = Store(tmp_path).rows("reference-logprobs", {"bench": 1})
    names = [f"{number:032x}" for number in range(EXAMPLES)]
    for start in range(0, EXAMPLES, 2_000):
        part = names[start : start + 2_000]
        count = len(part) * SAMPLES
        rows.append(
            pa.table(
                {
                    "example_id": np.repeat(part, SAMPLES),
                    "candidate_id": np.tile([f"c{k}" for k in range(SAMPLES)], len(part)),
                    "logprob": np.zeros(count),
                    "num_tokens": np.ones(count, np.int32),
                },
                schema=rows.schema,
            )
        )
    wanted = pa.table(
        {
            "example_id": np.repeat([*names, "new"], SAMPLES),
            "candidate_id": np.tile([f"c{k}" for k in range(SAMPLES)], EXAMPLES + 1),
        }
    )
    selection = list(np.random.default_rng(0).permutation(names)[: EXAMPLES // 2])
    ratios = []
    for _ in range(PAIRS):
        start = time.process_time()
        fresh = Store(tmp_path).rows("reference-logprobs", {"bench": 1})
        missing = fresh.missing(wanted).num_rows
        found = fresh.read(selection)
        middle = time.process_time()
        table = pa.concat_tables(pq.read_table(path) for path in rows.files())
        there = {(row["example_id"], row["candidate_id"]): row for row in table.to_pylist()}
        naive_missing = sum((row["example_id"], row["candidate_id"]) not in there for row in wanted.to_pylist())
        naive = [there[name, f"c{k}"] for name in selection for k in range(SAMPLES)]
        ratios.append((time.process_time() - middle) / (middle - start))
        assert missing == naive_missing == SAMPLES
        assert found.num_rows == len(naive)
    print(f"\n{EXAMPLES * SAMPLES:,} rows: {statistics.median(ratios):.1f}× the speed of Python dictionaries "
          f"(CPU time, {min(ratios):.1f}–{max(ratios):.1f} over {PAIRS} pairs)")  # fmt: skip
