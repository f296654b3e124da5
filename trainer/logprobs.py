"""The artifact that keeps log-probs of a frozen model, made by the same computation that trains."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import pyarrow as pa
import torch

from cpo_pipe.data import processes
from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models import Model
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.trainer.batches import micro_batches
from cpo_pipe.trainer.parallel import join, wait
from cpo_pipe.trainer.scorer import Attention, Scorer, choose

Pair = tuple[str, list[int], list[list[int]]]
"""An example's id, its prompt's token ids, and its candidates' token ids."""


def cached_logprobs(
    store: Store,
    model: Model,
    dtype: str,
    pairs: Sequence[Pair],
    attention: Attention | Literal["auto"] = "auto",
    micro_batch_tokens: int = 8192,
) -> Rows:
    """The artifact with log π(candidate | prompt) of every pair, made where missing.

    Args:
        store: where it is kept.
        model: the frozen model; loaded only if something is missing.
        dtype: `float32` or `bfloat16`; identity, because it changes the values.
        pairs: what is wanted.
        attention: as in training; no identity.
        micro_batch_tokens: tokens per forward pass; no identity.

    Raises:
        RunError: a log-prob is not finite.
    """
    rows = store.rows("reference-logprobs", {"model": model.fingerprint, "dtype": dtype})
    if processes.count() == 1 and not _missing(rows, pairs):
        return rows
    with rows.lock() if processes.is_main() else nullcontext():
        wait()
        missing = _missing(rows, pairs)
        wait()  # no process writes before all have looked
        if missing:
            _compute(rows, model, dtype, missing, attention, micro_batch_tokens)
        wait()
    return rows


def _missing(rows: Rows, pairs: Sequence[Pair]) -> list[Pair]:
    """Of each example the candidates whose log-probs are not there."""
    wanted = [
        (example_id, candidate_id(prompt, candidate))
        for example_id, prompt, candidates in pairs
        for candidate in candidates
    ]
    keys = pa.table(list(map(pa.array, zip(*wanted, strict=True))), names=list(rows.key))
    absent = {tuple(row.values()) for row in rows.missing(keys).to_pylist()}
    if not absent:
        return []
    found = []
    for example_id, prompt, candidates in pairs:
        these = {candidate_id(prompt, candidate): candidate for candidate in candidates}
        needed = [candidate for key, candidate in these.items() if (example_id, key) in absent]
        if needed:
            found.append((example_id, prompt, needed))
    return found


def target_logprobs(store: Store, model: Model, examples: pa.Table) -> list[tuple[float, int]]:
    """Of each example log π(target | prompt), summed, in nats, and the number of tokens; kept as `cached_logprobs`."""
    columns = [examples[name].to_pylist() for name in ("example_id", "prompt_ids", "target_ids")]
    pairs = [(key, prompt, [target]) for key, prompt, target in zip(*columns, strict=True)]
    table = cached_logprobs(store, model, "float32", pairs).read(columns[0])
    fields = (table[name].to_pylist() for name in ("candidate_id", "logprob", "num_tokens"))
    found = {candidate: (value, tokens) for candidate, value, tokens in zip(*fields, strict=True)}
    return [found[candidate_id(prompt, target)] for _, prompt, (target,) in pairs]


@torch.no_grad()
def _compute(
    rows: Rows,
    model: Model,
    dtype: str,
    pairs: Sequence[Pair],
    attention: Attention | Literal["auto"],
    micro_batch_tokens: int,
) -> None:
    state = join()
    network = model.load(torch.float32).to(state.device)
    scorer = Scorer(network, dtype).eval()
    texts = [(prompt, candidates) for _, prompt, candidates in pairs]
    choose(f"log-probs of {model.name}", scorer, texts, attention, gradients=False)
    plan = micro_batches(texts, scorer.attention, micro_batch_tokens, state.num_processes)[state.process_index]
    label, total = f"log-probs of {model.name}", sum(map(len, plan))
    with rows.writer() as writer, track(label, total, shown=state.is_main_process) as meter:
        for micro in filter(None, plan):
            packed = scorer.pack([texts[index] for index in micro])
            for index, values in zip(micro, packed.per_group(scorer(packed)), strict=True):
                writer.add(_rows(model, pairs[index], values.tolist()))
            meter.advance(len(micro))


def _rows(model: Model, pair: Pair, values: list[float]) -> list[dict[str, str | float | int]]:
    example_id, prompt, candidates = pair
    rows: list[dict[str, str | float | int]] = []
    for candidate, value in zip(candidates, values, strict=True):
        key = candidate_id(prompt, candidate)
        if not math.isfinite(value):
            raise RunError(f"{model.name}: log-prob of candidate {key} of example {example_id} is {value}")
        rows.append({"example_id": example_id, "candidate_id": key, "logprob": value, "num_tokens": len(candidate)})
    return rows
