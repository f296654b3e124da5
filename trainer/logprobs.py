"""The artifact that keeps log-probs of a frozen model, made by the same computation that trains."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cpo_pipe.data import processes
from cpo_pipe.data.errors import RunError
from cpo_pipe.data.executor import Executor, LocalExecutor, Made, Make
from cpo_pipe.data.models import Model, logprob_rows
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.trainer.attention import Attention
from cpo_pipe.trainer.batches import micro_batches
from cpo_pipe.trainer.dropout import remove_dropout
from cpo_pipe.trainer.parallel import join, share, wait
from cpo_pipe.trainer.scorer import Probes, Scorer, choose
from cpo_pipe.trainer.tables import Flags, Ints, Lengths, candidate_keys, probes, restricted, targets

LOOKED_UP = 4096
"""Groups whose candidates are looked up together."""
WINDOW = 512
"""Groups within which those of like length are computed together."""


@dataclass(frozen=True)
class LogProbs:
    """Work that computes log-probs of candidates (groups of trainer/tables.py, with candidate ids)."""

    rows: Rows
    model: Model
    dtype: str
    attention: Attention | Literal["auto"]
    micro_batch_tokens: int
    probes: Probes
    """Of all that is missing, so that every process computes in the same way."""
    logits_mb: int = 1024
    at_once: bool = False

    @property
    def outputs(self) -> Sequence[Rows]:
        """The log-probs."""
        return [self.rows]

    def open(self) -> Make:
        """Load the model, and choose how it is computed."""
        network = self.model.load(torch.float32).to(join().device)
        remove_dropout(network)
        scorer = Scorer(network, self.dtype, self.logits_mb).eval()
        name = f"log-probs of {self.model.name}"
        choose(name, scorer, self.probes, self.attention, self.micro_batch_tokens, gradients=False)
        return partial(self._make, scorer)

    def _make(self, scorer: Scorer, batch: pa.Table) -> Iterator[Made]:
        groups = batch.to_pylist()
        texts = [(group["prompt_ids"], [one["token_ids"] for one in group["candidates"]]) for group in groups]
        (plan,) = micro_batches(texts, scorer.attention, self.micro_batch_tokens)
        for micro in plan:
            packed = scorer.pack([texts[index] for index in micro])
            with torch.no_grad():
                values = packed.per_group(scorer(packed))
            rows = [self._row(groups[index]["example_id"], candidate, value)
                    for index, found in zip(micro, values, strict=True)
                    for candidate, value in zip(groups[index]["candidates"], found.tolist(), strict=True)]  # fmt: skip
            yield Made([rows], len(micro))

    def _row(self, example_id: str, candidate: dict[str, Any], value: float) -> dict[str, Any]:
        key = candidate["candidate_id"]
        if not math.isfinite(value):
            raise RunError(f"{self.model.name}: log-prob of candidate {key} of example {example_id} is {value}")
        tokens = len(candidate["token_ids"])
        return {"example_id": example_id, "candidate_id": key, "logprob": value, "num_tokens": tokens}


def cached_logprobs(
    store: Store,
    model: Model,
    dtype: str,
    groups: pa.Table,
    executor: Executor,
    attention: Attention | Literal["auto"] = "auto",
    micro_batch_tokens: int = 8192,
    logits_mb: int = 1024,
) -> Rows:
    """The artifact with log π(candidate | prompt) of every candidate, made where missing.

    Args:
        store: where it is kept.
        model: the frozen model; loaded only if something is missing.
        dtype: `float32` or `bfloat16`; identity, because it changes the values.
        groups: what is wanted, see trainer/tables.py; with candidate ids.
        executor: does what is missing; where several processes train, they do it themselves, each its share.
        attention: as in training; no identity.
        micro_batch_tokens: tokens per forward pass; no identity.
        logits_mb: memory for logits, in MiB; no identity.

    Raises:
        RunError: a log-prob is not finite.
    """
    rows = logprob_rows(store, model, dtype)
    if processes.count() == 1 and not _missing(rows, groups).any():
        return rows
    with rows.lock() if processes.is_main() else nullcontext():
        wait()
        missing_C = _missing(rows, groups)
        wait()  # no process writes before all have looked
        if missing_C.any():
            work = LogProbs(rows, model, dtype, attention, micro_batch_tokens, probes(groups, missing_C), logits_mb)
            _compute(work, groups, missing_C, executor)
        wait()
    return rows


def _missing(rows: Rows, groups: pa.Table) -> Flags:
    """Which candidates have no log-prob; of the same candidate twice in a group only the first, shape (C,)."""
    found = [np.empty(0, np.bool_)]
    for start, part in _parts(groups):
        keys = candidate_keys(part)
        missing = ~rows.contains(keys, refresh=start == 0)
        numbered = keys.append_column("place", pa.array(np.arange(keys.num_rows)))
        first = np.zeros(keys.num_rows, np.bool_)
        first[numbered.group_by(keys.column_names).aggregate([("place", "min")])["place_min"].to_numpy()] = True
        found.append(missing & first)
    return np.concatenate(found)


def _parts(groups: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Where each part of the groups begins, and the part. An example's neighbouring groups are never parted."""
    ids, start = groups["example_id"], 0
    while start < groups.num_rows:
        end = min(start + LOOKED_UP, groups.num_rows)
        while end < groups.num_rows and ids[end] == ids[end - 1]:
            end += 1
        yield start, groups.slice(start, end - start)
        start = end


def _compute(work: LogProbs, groups: pa.Table, missing_C: Flags, executor: Executor) -> None:
    """This process's share of what is missing; of one alone all of it, wherever the executor does it."""
    lengths = Lengths.of(groups)
    mine_G = np.zeros(groups.num_rows, np.bool_)
    mine_G[share(np.flatnonzero(np.logical_or.reduceat(missing_C, lengths.bounds()[:-1])))] = True
    items = _items(groups, missing_C & np.repeat(mine_G, lengths.size_G), lengths.bounds())
    where = executor if processes.count() == 1 else LocalExecutor()
    where.run(work, items, f"log-probs of {work.model.name}", int(mine_G.sum()))


def _items(groups: pa.Table, wanted_C: Flags, bounds: Ints) -> Iterator[pa.Table]:
    """Batches of the groups with their wanted candidates."""
    for start in range(0, groups.num_rows, WINDOW):
        part = groups.slice(start, WINDOW)
        wanted = wanted_C[bounds[start] : bounds[start + part.num_rows]]
        if wanted.any():
            yield restricted(part, wanted)


def read_logprobs(rows: Rows, groups: pa.Table) -> NDArray[np.float64]:
    """Recorded log-probs of all candidates of the groups, in their order, in nats, shape (C,).

    Raises:
        RunError: one is missing; a missing log-prob is never 0.
    """
    found = [np.empty(0)]
    for start, part in _parts(groups):
        keys = candidate_keys(part)
        ids = part["example_id"].unique()  # an example may have several groups, with prompts of its own
        recorded = rows.read(ids, [*rows.key, "logprob"], refresh=start == 0)
        numbered = keys.append_column("place", pa.array(np.arange(keys.num_rows)))
        joined = numbered.join(recorded, list(rows.key), join_type="left outer").sort_by("place")
        if joined["logprob"].null_count:
            row = joined.filter(pc.is_null(joined["logprob"])).slice(0, 1).to_pylist()[0]
            raise RunError(
                f"{rows.name}: no log-prob of candidate {row['candidate_id']} of example {row['example_id']}"
            )
        found.append(joined["logprob"].to_numpy())
    return np.concatenate(found)


def target_logprobs(store: Store, model: Model, examples: pa.Table, executor: Executor) -> list[tuple[float, int]]:
    """Of each example log π(target | prompt), summed, in nats, and the number of tokens; kept as `cached_logprobs`."""
    groups = targets(examples, identified=True)
    values = read_logprobs(cached_logprobs(store, model, "float32", groups, executor), groups)
    return list(zip(values.tolist(), Lengths.of(groups).candidate_C.tolist(), strict=True))
