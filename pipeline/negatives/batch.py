"""Batch negatives (BN): the continuations of other training prompts (§3)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.pipeline.engines.base import MakeRows

STRATEGY = "batch"
DRAWN_AT_ONCE = 32
"""Random numbers asked for at once; fixed, so that a larger n goes on where a smaller one stopped."""


def batch_spec(rendering: Spec, seed: int, pool: str) -> Spec:
    """They depend on the whole pool (a hash of its ids): other rows make other negatives; no model runs for it."""
    return {"strategy": STRATEGY, "prompt": rendering, "seed": seed, "pool": pool}


class Draw:
    """Draws other rows of a pool for each of its rows.

    Args:
        ids: example ids of the pool, in any order.
        prompts: their prompts; a row is never given the target of an equal prompt.
        targets: their targets; a row is never given one equal to its own, nor the same one twice.
        seed: of all draws.
    """

    def __init__(self, ids: Sequence[str], prompts: Sequence[str], targets: Sequence[str], seed: int):
        order = sorted(range(len(ids)), key=lambda row: ids[row])  # the pool's order must not matter
        self._rows = np.array(order)
        self._ids, self._prompts, self._targets = ids, prompts, targets
        self._seed = seed

    def others(self, row: int, n: int) -> list[int]:
        """The first n rows drawn for a row; a larger n only adds to a smaller one.

        Raises:
            InputError: the pool has fewer than n other targets of other prompts.
        """
        rng = np.random.default_rng(row_seed(self._seed, self._ids[row]))
        count = len(self._rows)
        found: list[int] = []
        seen = {self._targets[row]}
        drawn: set[int] = set()
        while len(found) < n and len(drawn) < count:
            for place in rng.integers(count, size=DRAWN_AT_ONCE).tolist():
                if place in drawn:
                    continue
                drawn.add(place)
                other = int(self._rows[place])
                if self._prompts[other] != self._prompts[row] and self._targets[other] not in seen:
                    seen.add(self._targets[other])
                    found.append(other)
                if len(found) == n:
                    break
        if len(found) < n:
            raise InputError(
                f"negatives.counts.batch is {n}, but for example {self._ids[row]} there are only "
                f"{len(found)} other targets of other prompts: lower it, or give more training examples"
            )
        return found


def maker(selection: pa.Table, seed: int) -> MakeRows:
    """Draws from a selection (EXAMPLES schema) for its own rows."""

    @cache
    def pool() -> tuple[Draw, dict[str, int]]:
        ids, prompts, targets = (selection[name].to_pylist() for name in ("example_id", "rendered", "target"))
        return Draw(ids, prompts, targets, seed), {example_id: row for row, example_id in enumerate(ids)}

    def make(rows: list[dict[str, Any]], indices: list[list[int]]) -> list[dict[str, Any]]:
        draw, place = pool()
        made = []
        for example, wanted in zip(rows, indices, strict=True):
            others = draw.others(place[example["example_id"]], max(wanted) + 1)
            chosen: list[dict[str, Any]] = selection.take([others[k] for k in wanted]).to_pylist()
            for k, other in zip(wanted, chosen, strict=True):
                made.append(
                    {
                        "example_id": example["example_id"],
                        "sample_index": k,
                        "strategy": STRATEGY,
                        "text": other["target"],
                        "token_ids": other["target_ids"],
                        "finish_reason": "stop" if other["ends"] else "length",
                        "logprob": None,
                        "seed": row_seed(seed, example["example_id"]) + k,
                        "generator": None,
                        "engine": None,
                    }
                )
        return made

    return make
