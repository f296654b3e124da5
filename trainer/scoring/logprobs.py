"""Log-probs of candidates under a frozen model: computed as in training, and kept in the store."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution import processes
from cpo_pipe.data.execution.base import Executor, LocalExecutor, Make, NewRows, Work
from cpo_pipe.data.models.model import Model, logprob_rows
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.trainer.distributed import join, make_missing, share
from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.batching import PassTokens, micro_batches, pass_tokens
from cpo_pipe.trainer.scoring.dropout import remove_dropout
from cpo_pipe.trainer.scoring.group_table import Flags, Ints, Lengths, candidate_keys, restricted, targets
from cpo_pipe.trainer.scoring.probes import Probes, select_probes
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import choose_backend

LOOKED_UP = 4096
"""Groups whose candidates are looked up together."""
WINDOW = 512
"""Groups within which those of similar length are computed together."""


def target_logprobs(store: Store, model: Model, examples: pa.Table, executor: Executor) -> list[tuple[float, int]]:
    """Return log π(target | prompt) of each example, summed, in nats, and the target's number of tokens; float32.

    Args:
        store: keeps the log-probs; those that it has are not computed again.
        model: the frozen model; loaded only if something is missing.
        examples: EXAMPLES schema.
        executor: computes what is missing.

    Raises:
        RunError: a log-prob is not finite.
    """
    groups = targets(examples, identified=True)
    values = read_logprobs(cached_logprobs(store, model, "float32", groups, executor), groups)
    return list(zip(values.tolist(), Lengths.of(groups).candidate_C.tolist(), strict=True))


def cached_logprobs(
    store: Store,
    model: Model,
    dtype: str,
    groups: pa.Table,
    executor: Executor,
    attention: AttentionBackend | Literal["auto"] = "auto",
    micro_batch_tokens: PassTokens = "auto",
    logits_mb: int = 1024,
) -> Rows:
    """Compute the log-probs of candidates that are missing, and return the artifact; `read_logprobs` reads from it.

    Args:
        store: keeps the log-probs.
        model: the frozen model; loaded only if something is missing.
        dtype: `float32` or `bfloat16`; part of the artifact's identity, because it changes the values.
        groups: see group_table.py; with candidate ids.
        executor: computes what is missing; several training processes each compute their share themselves instead.
        attention: as in training; not part of the identity.
        micro_batch_tokens: tokens per forward pass; not part of the identity.
        logits_mb: memory for logits, in MiB; not part of the identity.

    Raises:
        InputError: the attention backend asked for is not numerically equivalent for the model.
        RunError: a log-prob is not finite.
    """
    rows = logprob_rows(store, model, dtype)

    def make(missing_C: Flags) -> None:
        probes = select_probes(groups, missing_C)
        work = LogprobWork(rows, model, dtype, attention, micro_batch_tokens, probes, logits_mb)
        lengths = Lengths.of(groups)
        mine_G = np.zeros(groups.num_rows, np.bool_)
        mine_G[share(np.flatnonzero(np.logical_or.reduceat(missing_C, lengths.bounds()[:-1])))] = True
        items = _items(groups, missing_C & np.repeat(mine_G, lengths.size_G), lengths.bounds())
        where = executor if processes.count() == 1 else LocalExecutor()
        where.run(work, items, f"log-probs of {model.name}", int(mine_G.sum()))

    make_missing(lambda: _missing(rows, groups), make, rows)
    return rows


def read_logprobs(rows: Rows, groups: pa.Table) -> NDArray[np.float64]:
    """Return the recorded log-probs of all candidates of the groups, in their order, in nats, shape (C,).

    Raises:
        RunError: one is missing.
    """
    found = [np.empty(0)]
    for start, part in _parts(groups):
        keys = candidate_keys(part)
        ids = part["example_id"].unique()  # an example may have several groups, with different prompts
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


def load_scorer(
    model: Model,
    dtype: str,
    probes: Probes,
    attention: AttentionBackend | Literal["auto"] | Sequence[AttentionBackend] = "auto",
    micro_batch_tokens: PassTokens = "auto",
    logits_mb: int = 1024,
) -> Scorer:
    """Load a frozen model without dropout, on a GPU if there is one, and choose its attention backend.

    Args:
        model: the frozen model.
        dtype: `float32` or `bfloat16`.
        probes: of all groups that will be computed (`select_probes`).
        attention: `auto`, a backend, or several of which the first equivalent one is taken.
        micro_batch_tokens: tokens per forward pass of the self-check.
        logits_mb: memory for logits, in MiB.

    Raises:
        InputError: the model cannot be loaded, is not causal, or the backend asked for is not equivalent for it.
        RunError: the model's log-probs are not finite or not deterministic.
    """
    network = model.load(torch.float32).to(join().device)
    remove_dropout(network)
    scorer = Scorer(network, dtype, logits_mb).eval()
    choose_backend(f"model {model.name}", scorer, probes, attention, micro_batch_tokens, gradients=False)
    return scorer


@dataclass(frozen=True)
class LogprobWork(Work):
    """Work that computes log-probs of candidates; its batches are groups (group_table.py) with candidate ids."""

    unit: ClassVar[str] = "groups"

    rows: Rows
    model: Model
    dtype: str
    attention: AttentionBackend | Literal["auto"]
    micro_batch_tokens: PassTokens
    probes: Probes
    """Probes of all that is missing, so that every process chooses the same backend."""
    logits_mb: int = 1024

    def open(self) -> Make:
        """Load the model and choose its attention backend."""
        scorer = load_scorer(
            self.model, self.dtype, self.probes, self.attention, self.micro_batch_tokens, self.logits_mb
        )
        return partial(self._make, scorer)

    def _make(self, scorer: Scorer, batch: pa.Table) -> Iterator[NewRows]:
        groups = batch.to_pylist()
        texts = [(group["prompt_ids"], [one["token_ids"] for one in group["candidates"]]) for group in groups]
        budget = pass_tokens(self.micro_batch_tokens, scorer.model.device.type)
        (plan,) = micro_batches(texts, scorer.attention, budget)
        for micro in plan:
            packed = scorer.pack([texts[index] for index in micro])
            with torch.no_grad():
                values = packed.per_group(scorer(packed))
            rows = [self._row(groups[index]["example_id"], candidate, value)
                    for index, found in zip(micro, values, strict=True)
                    for candidate, value in zip(groups[index]["candidates"], found.tolist(), strict=True)]  # fmt: skip
            yield NewRows([rows], len(micro))

    def _row(self, example_id: str, candidate: dict[str, Any], value: float) -> dict[str, Any]:
        key = candidate["candidate_id"]
        if not math.isfinite(value):
            raise RunError(f"{self.model.name}: log-prob of candidate {key} of example {example_id} is {value}")
        tokens = len(candidate["token_ids"])
        return {"example_id": example_id, "candidate_id": key, "logprob": value, "num_tokens": tokens}


def _missing(rows: Rows, groups: pa.Table) -> Flags:
    """Return which candidates have no log-prob; of equal candidates of a group only the first, shape (C,)."""
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
    """Yield consecutive parts of the groups and where each begins; neighbouring groups of an example stay together."""
    ids, start = groups["example_id"], 0
    while start < groups.num_rows:
        end = min(start + LOOKED_UP, groups.num_rows)
        while end < groups.num_rows and ids[end] == ids[end - 1]:
            end += 1
        yield start, groups.slice(start, end - start)
        start = end


def _items(groups: pa.Table, wanted_C: Flags, bounds: Ints) -> Iterator[pa.Table]:
    """Yield batches of the groups with their wanted candidates."""
    for start in range(0, groups.num_rows, WINDOW):
        part = groups.slice(start, WINDOW)
        wanted = wanted_C[bounds[start] : bounds[start + part.num_rows]]
        if wanted.any():
            yield restricted(part, wanted)
