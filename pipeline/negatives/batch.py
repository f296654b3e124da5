"""Batch negatives (BN): the targets of other training prompts (§3)."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cpo_pipe.data.config import Location
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec, hash_keys, row_seed
from cpo_pipe.data.models.embedder import Embedder, EmbeddingCache, locate_embedder, truncation
from cpo_pipe.pipeline.negatives.strategy import ExampleWork, Inputs, Job, NegativesOf, Strategy, negative

log = logging.getLogger(__name__)

DRAW_SIZE = 32
"""Random numbers drawn at a time; fixed, so that a larger n continues a smaller one."""


class BatchTargets(Strategy):
    """Targets of other training prompts."""

    kind: ClassVar[str] = "batch"

    hard_negatives_from: int = Field(
        0,
        ge=0,
        description="draw this many targets and take those nearest to the row's own target by embedding (0: as drawn)",
    )
    embedder: Location = Field("minilm", description="sentence-transformers model of `hard_negatives_from`")

    @model_validator(mode="after")
    def _check(self) -> "BatchTargets":
        if 0 < self.hard_negatives_from < self.count:
            raise ValueError(
                f"hard_negatives_from is {self.hard_negatives_from}, fewer than count, which is {self.count}; raise it"
            )
        if not self.hard_negatives_from and "embedder" in self.model_fields_set:
            raise ValueError("embedder: not used without hard_negatives_from; remove it")
        return self

    def plan(self, inputs: Inputs) -> Job:
        """Plan the draws from all selected examples; other examples make other negatives."""
        embedder = locate_embedder(self.embedder, inputs.store) if self.hard_negatives_from else None
        members = hash_keys(sorted(inputs.selection["example_id"].to_pylist()))
        rows = inputs.rows(
            batch_spec(inputs.examples.rendering, inputs.seed, members, self.hard_negatives_from, embedder)
        )
        load = partial(load_draws, inputs.selection, inputs.seed, self.hard_negatives_from, embedder, inputs.key)
        # One process is enough, and a copy of all targets in each would cost memory.
        return Job(inputs.source(rows, self.count), ExampleWork(rows, load), in_process=True)


def batch_spec(
    rendering: Spec, seed: int, pool: str, hard_negatives_from: int = 0, embedder: Embedder | None = None
) -> Spec:
    """Return the identity of the draws; it contains `pool`, a hash of the ids of all examples drawn from."""
    spec: Spec = {"strategy": BatchTargets.kind, "prompt": rendering, "seed": seed, "pool": pool}
    if embedder is not None:
        spec |= {"hard_negatives_from": hard_negatives_from, "embedder": embedder.fingerprint}
    return spec


def nearest(target: str, others: Sequence[str], embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> list[int]:
    """Return the indices of the other texts by falling cosine to the target; ties keep the order of `others`."""
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

    def others(self, row: int, n: int, setting: str = "count") -> list[int]:
        """Return the first n rows drawn for a row; a larger n only adds to a smaller one.

        `setting` is the key that asks for n, for messages.

        Raises:
            InputError: the pool has fewer than n other targets of other prompts.
        """
        rng = np.random.default_rng(row_seed(self._seed, self._ids[row]))
        count = len(self._rows)
        found: list[int] = []
        seen = {self._targets[row]}
        drawn: set[int] = set()
        while len(found) < n and len(drawn) < count:
            for place in rng.integers(count, size=DRAW_SIZE).tolist():
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
                f"{setting} is {n}, but for example {self._ids[row]} there are only {len(found)} other targets of "
                "other prompts; lower it, or add training examples"
            )
        return found


def load_draws(
    selection: pa.Table, seed: int, hard_negatives_from: int, embedder: Embedder | None, key: str
) -> NegativesOf:
    """Index the pool, embed its targets if there is an embedder, and return what gives an example targets of others.

    Args:
        selection: the pool (EXAMPLES schema).
        seed: of all draws.
        hard_negatives_from: number of targets drawn; the most similar ones by embedding are taken (0: as drawn).
        embedder: for `hard_negatives_from`.
        key: the source's key in the recipe, for messages.
    """
    ids, prompts, targets = (selection[name].to_pylist() for name in ("example_id", "rendered", "target"))
    draw = Draw(ids, prompts, targets, seed)
    place = {example_id: row for row, example_id in enumerate(ids)}
    embeddings = None
    if embedder is not None:
        embeddings = EmbeddingCache(embedder)
        # In one fixed order: a vector's last digits depend on its batch, and they decide the order of targets that
        # the embedding model does not distinguish, such as those that differ only in case.
        distinct = sorted(set(targets))
        embeddings.add(distinct, "targets embedded")
        if count := embeddings.truncated(distinct):
            remedy = f"set {key}.embedder to a model that reads more"
            cut = truncation(count, len(distinct), embedder.name, embedder.window(), remedy)
            log.warning("hard_negatives_from: %s", cut)

    def negatives_of(example: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
        row = place[example["example_id"]]
        if embeddings is None:
            others = draw.others(row, max(indices) + 1, f"{key}.count")
        else:
            drawn = draw.others(row, hard_negatives_from, f"{key}.hard_negatives_from")
            order = nearest(targets[row], [targets[other] for other in drawn], embeddings.encode)
            others = [drawn[number] for number in order]
        chosen = selection.take([others[k] for k in indices]).to_pylist()
        first_seed = row_seed(seed, example["example_id"])
        return [
            negative(
                example,
                k,
                first_seed + k,
                strategy=BatchTargets.kind,
                text=other["target"],
                token_ids=other["target_ids"],
                ends=other["ends"],
            )
            for k, other in zip(indices, chosen, strict=True)
        ]

    return negatives_of
