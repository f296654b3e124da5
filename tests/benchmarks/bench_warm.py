"""Running a finished recipe again: 10,000 rows, all stages, nothing to make."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.conftest import make_model, pairs, write_jsonl

ROWS, RUNS = 10_000, 5
HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "scipy", "datasets")
COMMAND = """
import sys, json
from cpo_pipe.pipeline.cli import main
assert main(sys.argv[1:]) == 0
print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr)
"""


def make_embedder(folder: Path) -> Path:
    """A sentence model of a few thousand weights: what embedded does not matter to a run that embeds nothing."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "bert").mkdir(parents=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(32, 127)),
        *(f"##{chr(c)}" for c in range(33, 127)),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, models.Pooling(32)]).save(str(folder / "embedder"))
    return folder / "embedder"


def bench_warm(tmp_path: Path) -> None:
    model, embedder = make_model(tmp_path / "model"), make_embedder(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", pairs(ROWS))
    content = {
        "name": "warm",
        "data": {"source": str(tmp_path / "rows.jsonl"), "tokenizer": str(model), "test": 500},
        "train": {
            name: {"init": str(model), "objective": name, "reference": str(model), "steps": 2, "batch_size": 8}
            for name in ("cpo", "cpo-ranked")
        },
        "negatives": {"model": str(model), "counts": {"autoregressive": 1, "batch": 5, "truncation": 5},
                      "max_new_tokens": 4, "engine": "transformers", "batch_size": 1024},
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
