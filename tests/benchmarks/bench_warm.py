"""Running a finished recipe again: 10,000 rows, all stages, nothing to make."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.models import make_embedder, make_model
from tests.support.pairs import pairs, write_jsonl

ROWS, RUNS = 10_000, 5
HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "scipy", "datasets")
COMMAND = """
import sys, json
from cpo_pipe.cli import main
assert main(sys.argv[1:]) == 0
print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr)
"""


def bench_warm(tmp_path: Path) -> None:
    model, embedder = make_model(tmp_path / "model"), make_embedder(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", pairs(ROWS))
    content = {
        "name": "warm",
        "data": {"source": str(tmp_path / "rows.jsonl"), "tokenizer": str(model), "test": 500},
        "train": {
            name: {"init": str(model), "objective": name, "reference": str(model), "max_steps": 2, "batch_size": 8}
            for name in ("cpo", "cpo-ranked")
        },
        "negatives": {"sources": {
            "autoregressive": {"model": str(model), "count": 1, "max_new_tokens": 4, "engine": "transformers",
                               "batch_size": 1024},
            "batch": {"count": 5},
            "truncation": {"count": 5},
        }},
        "rank": {"model": str(embedder)},
        "evaluate": {"systems": {"cpo": {"model": "cpo"}, "ranked": {"model": "cpo-ranked"}}, "baseline": "cpo",
                     "judges": ["similarity"], "embedder": str(embedder), "max_new_tokens": 8,
                     "engine": "transformers"},
    }  # fmt: skip
    (tmp_path / "warm.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-c", COMMAND.format(heavy=HEAVY), "run", str(tmp_path / "warm.yaml"),
               "--store", str(tmp_path / "store"), "--run-dir", str(tmp_path / "run")]  # fmt: skip
    seconds = []
    for _ in range(RUNS + 1):
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - start)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert "0 made" in done.stderr
    print(f"\nthe first run {seconds[0]:.0f} s, again {statistics.median(seconds[1:]):.2f} s "
          f"({min(seconds[1:]):.2f} to {max(seconds[1:]):.2f} over {RUNS})")  # fmt: skip
