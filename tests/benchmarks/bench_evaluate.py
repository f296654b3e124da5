"""Evaluating 1,000 examples of four systems again: nothing is asked, generated or measured."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.api_server import serve, written
from tests.support.models import make_embedder, make_model
from tests.support.pairs import pairs, write_jsonl

EXAMPLES, RUNS = 1_000, 5


def bench_evaluate(tmp_path: Path) -> None:
    models = {name: str(make_model(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two", "three"))}
    embedder = make_embedder(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", pairs(EXAMPLES + 10))
    with serve(lambda seen: written(seen, "A" if "Response A" in str(seen.prompt) else "")) as server:
        content = {
            "name": "evaluation",
            "data": {"source": str(tmp_path / "rows.jsonl"), "tokenizer": models["one"], "test": EXAMPLES},
            "apis": {"api": {"url": server.url, "model": "m"}},
            "train": {"unused": {"init": models["one"], "objective": "mle"}},
            "evaluate": {
                "systems": {name: {"model": path} for name, path in models.items()} | {"api": {"model": "api"}},
                "baseline": "ground-truth", "embedder": str(embedder), "max_new_tokens": 8, "engine": "transformers",
                "judges": {"taste": {"kind": "openai", "api": "api", "template": "dolly"}, "similarity": {},
                           "longer": {}},
            },
        }  # fmt: skip
        (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(content))

        def run(stage: str, *more: str) -> float:
            command = [sys.executable, "-m", "cpo_pipe", stage, str(tmp_path / "evaluation.yaml"), *more,
                       "--store", str(tmp_path / "store"), "--run-dir", str(tmp_path / "run")]  # fmt: skip
            start = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return time.monotonic() - start

        run("prepare")
        first, asked = run("evaluate"), len(server.seen)
        again = [run("evaluate") for _ in range(RUNS)]
        other = run("evaluate", "--set", "evaluate.bootstrap=1000")
        assert len(server.seen) == asked > 4 * EXAMPLES
    print(f"\n{EXAMPLES:,} examples, 4 systems, 3 judges: the first time {first:.0f} s and {asked:,} calls; again "
          f"{statistics.median(again):.2f} s ({min(again):.2f} to {max(again):.2f} over {RUNS}), no call; with other "
          f"figures wanted of the same verdicts {other:.1f} s, no call")  # fmt: skip
    assert statistics.median(again) < 5
