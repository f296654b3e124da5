"""Embedding a run's negatives as `rank` does, against the sentence model's own `encode` of all of them.

The negatives are autoregressive ones of a small model that learned paragraphs of Python's documentation: their first
sentence is the prompt, the rest the target, so that they end at different places and some repeat each other.
"""

import re
import statistics
import time

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from cpo_pipe.data.models.embedder import locate_embedder
from cpo_pipe.data.sources import python_docs as pydocs
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.rank.candidates import collect_candidates
from cpo_pipe.recipe.load import parse_recipe
from cpo_pipe.run import Run
from tests.support.pairs import write_jsonl

GROUPS, PAIRS = 60, 5


def paragraphs() -> list[dict[str, str]]:
    found = []
    for article in pydocs.collect():
        for paragraph in article.split("\n\n"):
            parts = re.split(r"(?<=[.:]) ", paragraph, maxsplit=1)
            if len(parts) == 2 and len(parts[1]) > 20:
                found.append({"prompt": parts[0], "target": f" {parts[1]}"})
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rank")
    write_jsonl(folder / "rows.jsonl", paragraphs())
    config = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 5,
              "max_position_embeddings": 512}  # fmt: skip
    reference = {"init": {"architecture": "llama", "config": config}, "objective": "mle", "max_steps": 250,
                 "batch_size": 16, "learning_rate": 0.002, "lr_scheduler_type": "cosine"}  # fmt: skip
    content = {
        "name": "rank",
        "data": {"source": str(folder / "rows.jsonl"), "tokenizer": {"vocab_size": 2048}, "test": 100,
                 "max_prompt_tokens": 100, "max_target_tokens": 200, "max_rejected": 1},
        "train": {"reference": reference},
        "negatives": {"max_examples": GROUPS, "sources": {
            "autoregressive": {"model": "reference", "count": 11, "engine": "transformers"}}},
    }  # fmt: skip
    run = Run(parse_recipe(content, "rank"), "rank", Store(folder / "store"), folder / "run")
    run.prepare()
    run.train(["reference"])
    run.generate_negatives()
    return run


def bench_rank(run: Run) -> None:
    plan = run.resolver.negatives()
    examples = plan.selection.to_pylist()
    everything, _ = collect_candidates(examples, plan.sources, drop_duplicates=False)
    ours = locate_embedder("minilm", run.store)
    theirs = SentenceTransformer(str(ours.path))
    ours.encode(["loaded"])
    all_texts = [candidate["text"] for group in everything for candidate in group]
    ratios = []
    for _ in range(PAIRS):
        start = time.process_time()
        kept, _ = collect_candidates(examples, plan.sources, drop_duplicates=True)
        texts = [candidate["text"] for group in kept for candidate in group]
        left = ours.encode(texts)
        middle = time.process_time()
        right = theirs.encode(all_texts, normalize_embeddings=True)
        ratios.append((time.process_time() - middle) / (middle - start))
    place = dict(zip(all_texts, right, strict=True))
    cosines = [
        abs(float(vector @ left[0]) - float(place[text] @ place[texts[0]]))
        for text, vector in zip(texts, left, strict=True)
    ]
    lengths = np.array([len(candidate["token_ids"]) for group in everything for candidate in group])
    assert max(cosines) < 1e-6
    print(f"\n{len(all_texts)} texts of {lengths.mean():.0f} ± {lengths.std():.0f} tokens, "
          f"{1 - len(texts) / len(all_texts):.1%} dropped: {statistics.median(ratios):.2f}× the rate of "
          f"SentenceTransformer.encode (CPU time, {min(ratios):.2f} to {max(ratios):.2f} over {PAIRS} pairs); "
          f"cosines differ by {max(cosines):.1e} at most")  # fmt: skip
