"""Specs in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.store_commands.summary import Summaries

SPECS = [
    (
        "negatives",
        {"strategy": "batch", "seed": 1, "pool": "ab" * 16, "prompt": {}},
        "strategy batch, seed 1, pool abababab",
    ),
    (
        "negatives",
        {"strategy": "meanfield", "generator": "cd" * 16, "share": 0.15, "stop_ids": [0], "seed": 0, "prompt": {}},
        "strategy meanfield, generator cdcdcdcd, share 0.15, seed 0",
    ),
    (
        "groups",
        {
            "candidates": [
                {"count": 3, "negatives": {"strategy": "autoregressive"}, "label": "autoregressive"},
                {"count": 1, "negatives": {"strategy": "pool"}, "label": "gpt2"},
            ],
            "scorer": {"embedder": "ef" * 16},
            "drop_duplicates": False,
        },
        "count 3 + 1, label autoregressive + gpt2, strategy autoregressive + pool, embedder efefefef, "
        "drop duplicates false",
    ),
    (
        "checkpoints",
        {"merge": [["ab" * 16, 0.25], ["cd" * 16, 0.75]], "tokenizer": "ef" * 16},
        "merge [[abababab, 0.25], [cdcdcdcd, 0.75]]",
    ),
    (
        "checkpoints",
        {"base": "ab" * 16, "adapter": "cd" * 16},
        "base abababab, adapter cdcdcdcd",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 0.7, "top_k": 0, "max_new_tokens": 9}, "seed": 4},
        "model abababab, temperature 0.7, top k 0, max new tokens 9, seed 4",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 1, "top_k": 5, "top_p": 0.9, "max_new_tokens": 9}, "seed": 4},
        "model abababab, temperature 1, top k 5, top p 0.9, max new tokens 9, seed 4",
    ),
    (
        "generations",
        {"model": "ab" * 16, "sampling": {"temperature": 0, "beams": 4, "max_new_tokens": 9}},
        "model abababab, temperature 0, beams 4, max new tokens 9",
    ),
    ("verdicts", {"judge": "similarity", "embedder": "ab" * 16}, "judge similarity, embedder abababab"),
    (
        "tokenizers",
        {"corpus": {"sources": [{"source": {"kind": ".csv"}}]}, "vocab_size": 4096, "algorithm": "byte-level-bpe"},
        "algorithm byte-level-bpe, vocab size 4096, kind .csv",
    ),
    ("checkpoints", {"a_field": 3, "made": "by another version"}, "a field 3, made by another version"),
    ("a-kind-of-the-future", {"x": 1.5, "deep": {}}, "x 1.5"),
    (
        "negatives",
        {"strategy": "prompted", "generator": "cd" * 16, "instruction": "Make it worse. " * 9},
        "strategy prompted, generator cdcdcdcd, instruction "
        "Make it worse. Make it worse. Make it worse. Make it worse.…",
    ),
    ("verdicts", {"judge": "exact", "pattern": "a\x1b[2J\nb"}, r"judge exact, pattern a\x1b[2J b"),
]


@pytest.mark.parametrize(("kind", "spec", "words"), SPECS)
def test_specs_in_words(tmp_path: Path, kind: str, spec: dict[str, Any], words: str) -> None:
    path = tmp_path / kind / "0123456789abcdef"
    path.mkdir(parents=True)
    (path / "spec.json").write_text(json.dumps(spec))
    inventory = Inventory(tmp_path)
    (artifact,) = inventory.artifacts()
    assert Summaries(inventory).summary(artifact) == words
