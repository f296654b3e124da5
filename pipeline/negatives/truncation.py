"""Truncation negatives (TN): the target cut at a random place, with an end token behind it (§3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpo_pipe.data.executor import Make
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.models import TokenizerFiles
from cpo_pipe.data.store import Rows
from cpo_pipe.data.templates import eos_token_id
from cpo_pipe.pipeline.negatives.rows import negative, per_example

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


@dataclass(frozen=True)
class Truncated:
    """Work that cuts the targets of examples."""

    rows: Rows
    tokenizer: TokenizerFiles
    seed: int
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """The negatives."""
        return [self.rows]

    def open(self) -> Make:
        """Load the tokenizer."""
        tokenizer = self.tokenizer.load()
        end = eos_token_id(tokenizer)

        def negatives_of(example: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
            whole = example["target_ids"][:-1] if example["ends"] else example["target_ids"]
            places = cuts(example["example_id"], len(whole), max(indices) + 1, self.seed)
            first_seed = row_seed(self.seed, example["example_id"])
            return [
                negative(
                    example,
                    k,
                    first_seed + k,
                    strategy=STRATEGY,
                    text=str(tokenizer.decode(whole[: places[k]], skip_special_tokens=True)),
                    token_ids=[*whole[: places[k]], end],
                    ends=True,
                )
                for k in indices
            ]

        return per_example(negatives_of)
