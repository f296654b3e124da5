"""Truncation negatives (TN): the target cut at a random place, with an end token behind it (§3)."""

from functools import cache
from typing import Any

import numpy as np

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.templates import eos_token_id
from cpo_pipe.pipeline.engines.base import MakeRows

STRATEGY = "truncation"


def truncation_spec(rendering: Spec, seed: int) -> Spec:
    """A cut depends on the target, which its example id names, and on the seed."""
    return {"strategy": STRATEGY, "prompt": rendering, "seed": seed}


def cuts(example_id: str, tokens: int, n: int, seed: int) -> list[int]:
    """After how many of the target's tokens samples 0 … n − 1 end: each place once before any comes again.

    Args:
        example_id: with `seed` it decides the order of the places, so that a larger n only adds to a smaller one.
        tokens: of the target, without its end token; cuts keep 1 … tokens − 1 of them, of a single one none.
        n: how many cuts.
        seed: of all cuts.
    """
    places = np.arange(1, tokens) if tokens > 1 else np.zeros(1, np.int64)
    order = np.random.default_rng(row_seed(seed, example_id)).permutation(places)
    return [int(order[k % len(order)]) for k in range(n)]


def maker(examples: Examples, seed: int) -> MakeRows:
    """Cuts the targets of examples."""
    tokenizer = cache(examples.tokenizer.load)

    def make(rows: list[dict[str, Any]], indices: list[list[int]]) -> list[dict[str, Any]]:
        made = []
        for example, wanted in zip(rows, indices, strict=True):
            whole = example["target_ids"][:-1] if example["ends"] else example["target_ids"]
            places = cuts(example["example_id"], len(whole), max(wanted) + 1, seed)
            for k in wanted:
                kept = whole[: places[k]]
                made.append(
                    {
                        "example_id": example["example_id"],
                        "sample_index": k,
                        "strategy": STRATEGY,
                        "text": tokenizer().decode(kept, skip_special_tokens=True),
                        "token_ids": [*kept, eos_token_id(tokenizer())],
                        "finish_reason": "stop",
                        "logprob": None,
                        "seed": row_seed(seed, example["example_id"]) + k,
                        "generator": None,
                        "engine": None,
                    }
                )
        return made

    return make
