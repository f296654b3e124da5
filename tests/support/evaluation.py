"""Evaluations of tiny models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import example_id
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.eval.config import Evaluate
from cpo_pipe.eval.evaluate import Evaluation, evaluate

DECODINGS = {"greedy": {"temperature": 0}, "top-k": {"top_k": 5}}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def make_examples(store: Store, model: Path, count: int) -> Examples:
    """`count` test examples with an EOS and one training example."""
    tokenizer = locate_tokenizer(str(model), store)
    load = tokenizer.load()
    rows = []
    for number in range(count + 1):
        prompt, target = f"{number} the {WORDS[number % 8]}", f" {WORDS[number % 7]} {number} dog"
        rows.append(
            {"example_id": example_id(prompt, target), "split": "test" if number else "train", "prompt": prompt,
             "rendered": prompt, "target": target, "prompt_ids": load.encode(prompt),
             "target_ids": [*load.encode(target), 0], "ends": True, "category": None}
        )  # fmt: skip
    artifact = store.artifact("examples", {"count": count})
    if not artifact.complete():
        with artifact.create() as writer:
            pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), writer.path / "examples.parquet")
            writer.facts["end_tokens"] = [0]
    return Examples(artifact, tokenizer, {"template": "plain"})


def fake_nll(model: Model, examples: pa.Table) -> list[tuple[float, int]]:
    """Two nats for every token."""
    return [(-2.0 * len(ids), len(ids)) for ids in examples["target_ids"].to_pylist()]


class Bench:
    """A store with prepared examples and two models, and the evaluation of them."""

    def __init__(self, root: Path, models: dict[str, Path], count: int):
        self.store = Store(root)
        self.examples = make_examples(self.store, next(iter(models.values())), count)
        self.models = {name: locate_model(str(path), self.store) for name, path in models.items()}

    def run(
        self,
        ranker: str | None = None,
        nll: Any = fake_nll,
        max_new_tokens: int = 6,
        judge_models: Mapping[str, Model] | None = None,
        **settings: Any,
    ) -> Evaluation:
        defaults = {"systems": {name: {"model": name} for name in self.models}, "baseline": "one", "bootstrap": 200,
                    "engine": "transformers", "mauve_seeds": 0, "judges": ["exact"]}  # fmt: skip
        config = Evaluate.model_validate({**defaults, **settings})
        scored = "cpo_pipe.trainer.scoring.logprobs.target_logprobs"
        with patch(scored, lambda store, model, examples, executor: nll(model, examples)):
            return evaluate(
                config,
                self.store,
                self.examples,
                self.models,
                max_new_tokens=max_new_tokens,
                ranker=ranker,
                models=judge_models or {},
                apis={},
                executor=LocalExecutor(),
            )


def figures(result: Evaluation) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["system"], row["decoding"], row["metric"]): row for row in result.table("metrics").to_pylist()}


def no_engine(*_: object) -> Any:
    raise AssertionError("a model was loaded")
