"""Killed at random moments and resumed, the real command ends with the tables of an undisturbed run."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.pairs import pairs, write_jsonl

# Shards small enough that a killed stage has recorded some.
LAUNCHER = "from cpo_pipe.data.store import rows; rows.SHARD_SECONDS = 0.1; from cpo_pipe.cli import main; main()"
MADE_BY = {
    "generate-negatives": ["negatives"],
    "rank": ["groups", "rejected"],
    "train": ["checkpoints", "reference-logprobs"],
}
COMPARED = ["negatives", "groups", "reference-logprobs"]
RAY = ["--executor", "ray", "--workers", "2"]
KILLS = {"local driver": 8, "ray driver": 6, "ray actor": 6}
"""Of each stage: 60 in all."""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def recipe(folder: Path, model: Path, rows: int) -> Path:
    write_jsonl(folder / "rows.jsonl", pairs(rows + 1))
    content = {
        "name": "soak",
        "data": {"source": str(folder / "rows.jsonl"), "tokenizer": str(model), "test": 1},
        "train": {
            "cpo": {"init": str(model), "objective": "cpo-ranked", "reference": str(model), "max_steps": 3,
                    "batch_size": 8}
        },
        "negatives": {"sources": {
            "autoregressive": {"model": str(model), "count": 4, "max_new_tokens": 24, "engine": "transformers",
                               "batch_size": 4},
            "meanfield": {"model": str(model)},
            "truncation": {},
        }},
    }  # fmt: skip
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Work:
    """A recipe on a store, whose stages are started as commands of their own."""

    def __init__(self, recipe: Path, store: Path):
        self.recipe, self.store = recipe, store

    def start(self, stage: str, options: list[str]) -> subprocess.Popen[bytes]:
        folders = ["--store", str(self.store), "--run-dir", str(self.store.parent / "run")]
        command = [sys.executable, "-c", LAUNCHER, stage, str(self.recipe), *folders, *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finish(self, stage: str, options: list[str]) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        assert self.start(stage, options).wait(300) == 0
        return time.monotonic() - began

    def forget(self, stage: str) -> None:
        """Remove what the stage made."""
        for kind in MADE_BY[stage]:
            shutil.rmtree(self.store / kind, ignore_errors=True)

    def table(self, kind: str) -> pa.Table:
        """All rows of a kind, each once, by key."""
        from cpo_pipe.data.store import Store

        parts = []
        for spec in sorted(self.store.glob(f"{kind}/*/spec.json")):
            rows = Store(self.store).rows(kind, yaml.safe_load(spec.read_text()))
            keys = pa.concat_tables(pq.read_table(file, columns=["example_id"]) for file in rows.files())
            parts.append(rows.read(sorted(set(keys["example_id"].to_pylist()))))
        return pa.concat_tables(parts)


def processes_of(driver: int) -> Iterator[int]:
    """Ray's actors below a process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above = process
        while above in parents and above != driver:
            above = parents[above]
        with suppress(OSError):
            if above == driver and b"MapWorker" in Path(f"/proc/{process}/cmdline").read_bytes():
                yield process


def kill(process: subprocess.Popen[bytes], what: str, rng: random.Random) -> bool:
    """Kill the command, or one of its actors; returns whether there was something to kill."""
    if what.endswith("driver"):
        process.kill()
        return process.wait(60) != 0
    actors = list(processes_of(process.pid))
    if not actors:
        return False
    with suppress(ProcessLookupError):
        os.kill(rng.choice(actors), signal.SIGKILL)
        return True
    return False


def compare(left: pa.Table, right: pa.Table) -> None:
    """Sums of floats differ in the last bits with what shares a batch."""
    floats = {"logprob", "candidates"} & set(left.column_names)
    assert left.drop(list(floats)) == right.drop(list(floats))
    if "logprob" in floats:
        values = [table["logprob"].fill_null(0.0).to_pylist() for table in (left, right)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    if "candidates" in floats:
        assert [ids(group) for group in left.to_pylist()] == [ids(group) for group in right.to_pylist()]


def ids(group: dict[str, Any]) -> list[tuple[str, list[int]]]:
    return [(candidate["candidate_id"], candidate["token_ids"]) for candidate in group["candidates"]]


def soak(folder: Path, model: Path, rows: int, stages: list[str], kills: dict[str, int]) -> None:
    """Of each stage of one store the command or its actors are killed; the other store is left in peace."""
    path = recipe(folder, model, rows)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    calm, rough = Work(path, folder / "a" / "store"), Work(path, folder / "b" / "store")
    for work in (calm, rough):
        work.finish("prepare", [])
    rng, killed = random.Random(0), 0
    for stage in stages:
        took = {"local": calm.finish(stage, [])}
        for what, count in kills.items():
            options = RAY if what.startswith("ray") else []
            if options and "ray" not in took:
                rough.forget(stage)
                took["ray"] = rough.finish(stage, options)
            rough.forget(stage)
            done, fresh, mode = 0, True, what.split()[0]
            while done < count:
                began, process = time.monotonic(), rough.start(stage, options)
                try:
                    process.wait(rng.uniform(0.3, 0.95) * took[mode])
                    if fresh:  # done before its time: the machine is less busy than it was
                        took[mode] = time.monotonic() - began
                except subprocess.TimeoutExpired:
                    done += kill(process, what, rng)
                fresh = process.wait(300) == 0 and done < count
                if fresh:  # nothing is left that could be killed: once more from the start
                    rough.forget(stage)
            killed += done
        rough.finish(stage, [])
        for kind in set(MADE_BY[stage]) & set(COMPARED):
            compare(calm.table(kind), rough.table(kind))
    print(f"\n{killed} kills")


@pytest.mark.soak
@needs_ray
def test_60_kills_of_commands_and_actors_change_no_row(tmp_path: Path, tiny_model: Path) -> None:
    soak(tmp_path, tiny_model, 160, list(MADE_BY), KILLS)


@pytest.mark.soak
def test_a_killed_command_changes_no_row(tmp_path: Path, tiny_model: Path) -> None:
    """Ray's drivers and actors are killed in the soak only: each of its commands takes most of a minute."""
    soak(tmp_path, tiny_model, 8, ["generate-negatives"], {"local driver": 1})
