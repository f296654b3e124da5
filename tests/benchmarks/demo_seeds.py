"""The demo on fresh seeds: how often its claim holds, its time and its memory (`just demo-seeds`; resumable).

A seed changes the split, initial weights, data orders, negatives and samples. Each run has a store of its own, as that
of a new user. Prints a Markdown table.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SEEDED = ("data.split_seed", "train.reference.init.seed", "train.reference.seed", "train.mle.seed",
          "train.cpo-ranked.seed", "negatives.seed", "evaluate.seed")  # fmt: skip
SHOWN = ("distinct-2", "chrF", "similarity win rate", "target NLL")


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Run the demo with a seed, and return its verdict, time and peak memory; or return what an earlier call found."""
    result = folder / f"seed-{seed}.json"
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    own = folder / f"seed-{seed}"
    options = [part for key in SEEDED for part in ("--set", f"{key}={seed}")]
    command = [sys.executable, "-m", "cpo_pipe", "demo", "--store", str(own / "store"), "--run-dir", str(own / "run")]
    start = time.monotonic()
    measured = ["/usr/bin/time", "-f", "peak %M KiB", *command, *options]
    done = subprocess.run(measured, capture_output=True, text=True, check=True)
    peak = re.findall(r"peak (\d+) KiB", done.stderr)[-1]
    metrics = pq.read_table(own / "run" / "metrics.parquet").to_pylist()
    values = {f"{row['system']} {row['metric']}": row["value"] for row in metrics}
    found = {
        "seed": seed, "verdict": done.stdout.strip().splitlines()[-1], "seconds": time.monotonic() - start,
        "peak_mib": int(peak) / 1024, "values": values,
    }  # fmt: skip
    result.write_text(json.dumps(found))
    return found


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, a row per seed."""
    columns = [f"{metric}: {system}" for metric in SHOWN for system in ("mle", "cpo-ranked")]
    yield f"| seed | {' | '.join(columns)} | ground truth's distinct-2 | minutes | MiB | verdict |"
    yield f"| ---: |{' ---: |' * (len(columns) + 3)} --- |"
    for found in results:
        values = found["values"]
        cells = [
            f"{values[f'{system} {metric}']:.3f}" if f"{system} {metric}" in values else "–"
            for metric in SHOWN
            for system in ("mle", "cpo-ranked")
        ]
        truth = f"{values['ground-truth distinct-2']:.3f}"
        minutes, peak = found["seconds"] / 60, found["peak_mib"]
        yield f"| {found['seed']} | {' | '.join(cells)} | {truth} | {minutes:.1f} | {peak:.0f} | {found['verdict']} |"
    minutes = [found["seconds"] / 60 for found in results]
    yield f"\nMedian {statistics.median(minutes):.1f} minutes, at most {max(minutes):.1f}."


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 110)))
    parser.add_argument("--folder", type=Path, default=Path("demo-seeds"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in given.seeds:
        results.append(run(seed, given.folder))
        print(results[-1]["verdict"], file=sys.stderr, flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
