"""Truncation negatives (TN): the target cut at a random place, followed by the token that ends targets (§3)."""

from functools import partial
from typing import Any, ClassVar

import numpy as np

from cpo_pipe.data.fingerprint import row_seed
from cpo_pipe.data.models.answers import end_token
from cpo_pipe.data.models.templates import eos_token_id
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.pipeline.negatives.strategy import ExampleWork, Inputs, Job, NegativesOf, Strategy, negative


class Truncation(Strategy):
    """The target cut at a random place, with an end token."""

    kind: ClassVar[str] = "truncation"

    def plan(self, inputs: Inputs) -> Job:
        """Plan the cuts; they depend on the target, which the example id identifies, and on the seed."""
        rows = inputs.rows({"strategy": self.kind, "prompt": inputs.examples.rendering, "seed": inputs.seed})
        work = ExampleWork(rows, partial(_load, inputs.examples.tokenizer, inputs.seed))
        return Job(inputs.source(rows, self.count), work)


def _load(files: TokenizerFiles, seed: int) -> NegativesOf:
    tokenizer = files.load()
    eos = eos_token_id(tokenizer)

    def negatives_of(example: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
        target = example["target_ids"][:-1] if example["ends"] else example["target_ids"]
        places = cuts(example["example_id"], len(target), max(indices) + 1, seed)
        first_seed = row_seed(seed, example["example_id"])
        return [
            negative(
                example,
                k,
                first_seed + k,
                strategy=Truncation.kind,
                text=str(tokenizer.decode(target[: places[k]], skip_special_tokens=True)),
                token_ids=[*target[: places[k]], end_token(example, eos)],
                ends=True,
            )
            for k in indices
        ]

    return negatives_of


def cuts(example_id: str, tokens: int, n: int, seed: int) -> list[int]:
    """Return how many of the target's tokens samples 0 … n − 1 keep; all numbers occur once before any repeats.

    Args:
        example_id: with `seed` it determines the order of the places, so that a larger n only adds to a smaller one.
        tokens: length of the target, without its end token. A cut keeps 1 … tokens − 1 of them, or 0 of a single one.
        n: how many cuts.
        seed: of all cuts.
    """
    places = np.arange(1, tokens) if tokens > 1 else np.zeros(1, np.int64)
    order = np.random.default_rng(row_seed(seed, example_id)).permutation(places)
    return [int(order[k % len(order)]) for k in range(n)]
