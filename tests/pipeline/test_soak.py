"""Killed at random moments and resumed, the real command ends with the tables of an undisturbed run."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import pairs, write_jsonl

KILLS = 8
"""Of each stage while it runs."""
# Shards small enough that a killed stage has recorded some.
LAUNCHER = "from cpo_pipe.data import store; store.SHARD_SECONDS = 0.1; from cpo_pipe.pipeline.cli import main; main()"
MADE_BY = {
    "prepare": ["examples"],
    "generate-negatives": ["negatives"],
    "rank": ["groups", "rejected"],
    "train": ["checkpoints", "reference-logprobs"],
}
KEYS = {
    "negatives": ["example_id", "sample_index"],
    "groups": ["example_id"],
    "reference-logprobs": ["example_id", "candidate_id"],
}


def recipe(folder: Path, model: Path) -> Path:
    write_jsonl(folder / "rows.jsonl", pairs(161))
    content = {
        "name": "soak",
        "data": {"source": str(folder / "rows.jsonl"), "tokenizer": str(model), "test": 1},
        "train": {
            "cpo": {"init": str(model), "objective": "cpo-ranked", "reference": str(model), "steps": 3, "batch_size": 8}
        },
        "negatives": {"model": str(model), "counts": {"autoregressive": 6}, "max_new_tokens": 24,
                      "engine": "transformers", "batch_size": 4},
    }  # fmt: skip
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(stage: str, path: Path, store: Path) -> subprocess.Popen[bytes]:
    folders = ["--store", str(store), "--run-dir", str(path.parent / "run")]
    command = [sys.executable, "-c", LAUNCHER, stage, str(path), *folders]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def table(store: Path, kind: str) -> pa.Table:
    keys = [(key, "ascending") for key in KEYS[kind]]
    whole = pa.concat_tables(pq.read_table(path) for path in sorted(store.glob(f"{kind}/*/shards/*.parquet")))
    return whole.sort_by(keys)


def ids(group: dict[str, Any]) -> list[tuple[str, list[int]]]:
    return [(candidate["candidate_id"], candidate["token_ids"]) for candidate in group["candidates"]]


@pytest.mark.soak
def test_the_tables_are_those_of_an_undisturbed_run(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    stages = ["prepare", "generate-negatives", "rank", "train"]
    durations = {}
    for stage in stages:
        began = time.monotonic()
        assert start(stage, path, calm).wait(300) == 0
        durations[stage] = time.monotonic() - began
    rng = random.Random(0)
    for stage in stages:
        kills = 0
        while kills < KILLS:
            process = start(stage, path, rough)
            time.sleep(rng.uniform(0.3, 0.95) * durations[stage])
            process.kill()
            if process.wait(60) == 0:  # it was done before: once more from the start
                for kind in MADE_BY[stage]:
                    shutil.rmtree(rough / kind, ignore_errors=True)
            else:
                kills += 1
        assert start(stage, path, rough).wait(300) == 0
    for kind in KEYS:
        left, right = table(calm, kind), table(rough, kind)
        assert len(list(rough.glob(f"{kind}/*/manifests/*.json"))) > 1, "what was made before a kill was kept"
        # Sums of floats differ in the last bits with what shares a batch.
        floats = {"logprob", "candidates"} & set(left.column_names)
        assert left.drop(list(floats)) == right.drop(list(floats))
        if "logprob" in floats:
            assert left["logprob"].to_pylist() == pytest.approx(right["logprob"].to_pylist(), rel=1e-5)
        if kind == "groups":
            assert [ids(group) for group in left.to_pylist()] == [ids(group) for group in right.to_pylist()]
