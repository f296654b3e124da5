"""Pools on the command line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.pools import bytes_tokenizer, with_tokenizer
from tests.support.project import Project


@pytest.fixture
def pools(project: Project, new_model: Callable[..., Path]) -> Project:
    """A recipe with a mixture of three pools and autoregressive negatives, prepared."""
    other_model = with_tokenizer(new_model(seed=3, vocab_size=290, eos_token_id=1), bytes_tokenizer())
    recipe = yaml.safe_load((project.root / "tiny.yaml").read_text())
    samples = {"max_new_tokens": 8, "engine": "transformers"}
    recipe["negatives"]["sources"] = {
        "autoregressive": {"model": str(project.model), "count": 2, **samples},
        "strong": {"strategy": "pool", "file": "strong.jsonl", "count": 2, "strength": 2, "max_new_tokens": 8},
        "weak": {"strategy": "pool", "model": str(other_model), "count": 2, "strength": 1, **samples},
        "same": {"strategy": "pool", "model": str(new_model(seed=5)), "strength": 0, **samples},
    }
    recipe["rank"] = {}
    project.write("tiny.yaml", yaml.safe_dump(recipe, sort_keys=False))
    pairs = [json.loads(line) for line in (project.root / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": pair["prompt"], "text": [pair["target"], f" dog {pair['prompt']}"]} for pair in pairs[:20]]
    project.write("strong.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert project.cli("prepare", "tiny.yaml").status == 0
    return project


def groups(project: Project) -> list[dict[str, Any]]:
    return [group for path in project.store.glob("groups/*/shards/*") for group in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_a_mixture_with_pools_makes_ragged_groups(pools: Project) -> None:
    generated = pools.cli("generate-negatives", "tiny.yaml")
    assert generated.status == 0, generated.err
    assert "negatives.sources.strong.file strong.jsonl: has " in generated.err
    ranked = pools.cli("rank", "tiny.yaml")
    assert ranked.status == 0, ranked.err
    assert "copy of the target" in ranked.err
    made = groups(pools)
    assert len(made) == 16
    for group in made:
        names = [candidate["strategy"] for candidate in group["candidates"]]
        order = ["target", "autoregressive", "strong", "weak", "same"]
        assert sorted(names, key=order.index) == names, "a candidate can be led back to its pool"
        assert names.count("strong") <= 1, "of its two one is the target"
        assert sorted(candidate["rank"] for candidate in group["candidates"]) == list(range(len(names)))
    assert {"strong" in str(group) for group in made} == {True, False}
    before = pools.made()
    there = sum(pq.read_metadata(file).num_rows for file in pools.store.glob("negatives/*/shards/*.parquet"))
    for said, column in ((generated.err, "made"), (pools.cli("generate-negatives", "tiny.yaml").err, "reused")):
        counts = [int(count) for count in re.findall(rf"(\d+) {column}\b", said)]
        assert sum(counts) == there, "what was refused was neither made nor reused"
        assert "strong do not exist or cannot be made; the reasons are in rejected/" in said
    assert pools.cli("rank", "tiny.yaml").status == 0
    assert pools.made() == before


def test_a_file_that_cannot_be_used_is_named_before_anything_is_sampled(pools: Project) -> None:
    pools.write("strong.jsonl", '{"prompt": "say the 0", "answer": "x"}\n')
    result = pools.cli("generate-negatives", "tiny.yaml")
    assert result.status == 2
    assert "no column 'text' (negatives.sources.strong.columns.text)" in result.error()
    assert not list(pools.store.glob("negatives/*/shards/*.parquet"))


def test_names_and_strengths_are_not_identity_of_negatives(pools: Project) -> None:
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    before = pools.made()
    recipe = (pools.root / "tiny.yaml").read_text().replace("strong:", "gold:").replace("strength: 2", "strength: 9")
    (pools.root / "strong.jsonl").rename(pools.root / "gold.jsonl")
    pools.write("tiny.yaml", recipe.replace("strong.jsonl", "gold.jsonl"))
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    assert pools.made() == before
    assert pools.cli("generate-negatives", "tiny.yaml", "--set", "negatives.sources.gold.count=3").status == 0
    assert len(set(pools.made()) - set(before)) == 2, "one more of each, none of which is there: reasons alone"
    pools.write("gold.jsonl", (pools.root / "gold.jsonl").read_text().replace("dog", "cat"))
    assert pools.cli("generate-negatives", "tiny.yaml").status == 0
    assert len({path.split("/")[1] for path in set(pools.made()) - set(before) if path.startswith("negatives")}) == 1


BAD_RUNS = {
    "negatives.sources.strong.file=gone.jsonl": "negatives.sources.strong.file gone.jsonl: no such file",
    "negatives.sources.strong.file=tiny.yaml": "strong.file tiny.yaml: suffix '.yaml' is not supported; ",
    "negatives.sources.strong.columns={text: txt}": "no column 'txt' (negatives.sources.strong.columns.text);",
    "negatives.sources.weak.model=gone/model": "model gone/model: no such folder or training",
    "negatives.sources.weak.strategy=pol": "negatives.sources.weak: unknown strategy 'pol'; did you mean pool?",
    "negatives.sources.weak.file=strong.jsonl": "negatives.sources.weak: give either model or file",
}


@pytest.mark.parametrize("override", BAD_RUNS)
def test_a_bad_pool_is_one_line(pools: Project, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pools.cli("generate-negatives", "tiny.yaml", "--set", override)
    assert result.status == 2
    assert BAD_RUNS[override] in result.error()
