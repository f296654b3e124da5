"""Batch negatives (BN): the continuations of other training prompts (§3)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.data.embedding import Embedder, EmbeddingMemo, truncation
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.executor import Make
from cpo_pipe.data.fingerprint import Spec, row_seed
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.negatives.rows import negative, per_example

log = logging.getLogger(__name__)

STRATEGY = "batch"
DRAWN_AT_ONCE = 32
"""Random numbers asked for at once; fixed, so that a larger n goes on where a smaller one stopped."""


def batch_spec(rendering: Spec, seed: int, pool: str, hardest: int = 0, embedder: Embedder | None = None) -> Spec:
    """They depend on the whole pool (a hash of its ids): other rows make other negatives; no generator runs for it."""
    spec: Spec = {"strategy": STRATEGY, "prompt": rendering, "seed": seed, "pool": pool}
    return spec if embedder is None else {**spec, "hardest": hardest, "embedder": embedder.fingerprint}


def nearest(target: str, others: Sequence[str], embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> list[int]:
    """Numbers of the other texts by falling cosine to the target; of equal ones the first drawn comes first."""
    vectors = embed([target, *others])
    return [int(number) for number in np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")]


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

    def others(self, row: int, n: int, field: str = "counts.batch") -> list[int]:
        """The first n rows drawn for a row; a larger n only adds to a smaller one; `field` asks for so many.

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
                f"negatives.{field} is {n}, but for example {self._ids[row]} there are only "
                f"{len(found)} other targets of other prompts: lower it, or give more training examples"
            )
        return found


@dataclass(frozen=True)
class Borrowed:
    """Work that gives each example of a selection targets of others."""

    rows: Rows
    selection: pa.Table
    """EXAMPLES schema; the pool."""
    seed: int
    hardest: int = 0
    """Of so many drawn the nearest by embedding are taken; 0: as drawn."""
    embedder: Embedder | None = None
    """For `hardest`."""
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """The negatives."""
        return [self.rows]

    def open(self) -> Make:
        """Index the pool."""
        ids, prompts, targets = (self.selection[name].to_pylist() for name in ("example_id", "rendered", "target"))
        draw = Draw(ids, prompts, targets, self.seed)
        place = {example_id: row for row, example_id in enumerate(ids)}
        memo = EmbeddingMemo(self.embedder) if self.embedder is not None else None
        if memo is not None:
            # All in one order: a vector's last digits depend on what is computed beside it, and with them the order of
            # targets that are equal to the embedding model, such as those unlike in case only.
            distinct = sorted(set(targets))
            memo.add(distinct, "targets embedded")
            if self.embedder is not None and (count := memo.truncated(distinct)):
                remedy = "set negatives.embedder to a model that reads more"
                cut = truncation(count, len(distinct), self.embedder.name, self.embedder.window(), remedy)
                log.warning("hardest: %s", cut)

        def negatives_of(example: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
            row = place[example["example_id"]]
            if memo is None:
                others = draw.others(row, max(indices) + 1)
            else:
                drawn = draw.others(row, self.hardest, "hardest")
                order = nearest(targets[row], [targets[other] for other in drawn], memo.encode)
                others = [drawn[number] for number in order]
            chosen = self.selection.take([others[k] for k in indices]).to_pylist()
            first_seed = row_seed(self.seed, example["example_id"])
            return [
                negative(
                    example,
                    k,
                    first_seed + k,
                    strategy=STRATEGY,
                    text=other["target"],
                    token_ids=other["target_ids"],
                    ends=other["ends"],
                )
                for k, other in zip(indices, chosen, strict=True)
            ]

        return per_example(negatives_of)
