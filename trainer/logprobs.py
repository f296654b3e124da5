"""Log-probs of continuations, and the artifact that keeps them.

Shapes: N continuations, T tokens of the longest prompt with its continuation, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models import Model
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows, Store

BATCH_TOKENS = 1 << 14
"""Padded tokens per forward pass when only log-probs are wanted."""


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(model: Model) -> PreTrainedModel:
    """The model in float32 with all dropout off."""
    return model.load(torch.float32).to(device()).eval()  # type: ignore[no-any-return,arg-type]


def precision(dtype: str) -> AbstractContextManager[Any]:
    """The arithmetic of a training: float32, or bfloat16 by autocast over float32 weights."""
    return nullcontext() if dtype == "float32" else torch.autocast(device().type, torch.bfloat16)


def continuation_logprobs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Tensor:
    """Log π(continuation | prompt) of each pair, summed over the continuation's tokens: (N,), float32, in nats.

    The plain way: every prompt with its continuation is one right-padded row. Prompts and continuations are non-empty.
    """
    rows = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    width = max(map(len, rows))
    ids_NT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_NT = torch.zeros_like(ids_NT)
    scored_NT = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids_NT[row, : len(ids)] = torch.tensor(ids)
        mask_NT[row, : len(ids)] = 1
        scored_NT[row, len(prompt) : len(ids)] = True
    ids_NT, mask_NT, scored_NT = (tensor.to(model.device) for tensor in (ids_NT, mask_NT, scored_NT))
    logits_NTV = model(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).logits[:, :-1]
    scored_NT, labels_NT = scored_NT[:, 1:], ids_NT[:, 1:]
    picked = -functional.cross_entropy(logits_NTV[scored_NT].float(), labels_NT[scored_NT], reduction="none")
    return torch.zeros(scored_NT.shape, device=model.device).masked_scatter(scored_NT, picked).sum(-1)


def cached_logprobs(
    store: Store, model: Model, dtype: str, pairs: Sequence[tuple[str, list[int], list[list[int]]]]
) -> Rows:
    """The artifact with log π(candidate | prompt) of every pair, made where missing.

    Args:
        store: where it is kept.
        model: the frozen model; loaded only if something is missing.
        dtype: `float32` or `bfloat16`; identity, because it changes the values.
        pairs: per example its id, its prompt's token ids and its candidates' token ids.
    """
    rows = store.rows("reference-logprobs", {"model": model.fingerprint, "dtype": dtype})
    wanted = {
        (example_id, candidate_id(prompt, candidate)): (prompt, candidate)
        for example_id, prompt, candidates in pairs
        for candidate in candidates
    }
    keys = pa.table(list(map(pa.array, zip(*wanted, strict=True))), names=list(rows.key))
    if not rows.missing(keys).num_rows:
        return rows
    with rows.lock():
        missing = [tuple(row.values()) for row in rows.missing(keys).to_pylist()]
        if missing:
            _compute(rows, model, dtype, {key: wanted[key] for key in missing})
    return rows


def target_logprobs(store: Store, model: Model, examples: pa.Table) -> list[tuple[float, int]]:
    """Of each example log π(target | prompt), summed, in nats, and the number of tokens; kept as `cached_logprobs`."""
    columns = [examples[name].to_pylist() for name in ("example_id", "prompt_ids", "target_ids")]
    pairs = [(key, prompt, [target]) for key, prompt, target in zip(*columns, strict=True)]
    table = cached_logprobs(store, model, "float32", pairs).read(columns[0])
    fields = (table[name].to_pylist() for name in ("candidate_id", "logprob", "num_tokens"))
    found = {candidate: (value, tokens) for candidate, value, tokens in zip(*fields, strict=True)}
    return [found[candidate_id(prompt, target)] for _, prompt, (target,) in pairs]


@torch.inference_mode()
def _compute(rows: Rows, model: Model, dtype: str, wanted: dict[tuple[str, str], tuple[list[int], list[int]]]) -> None:
    network = load_model(model)
    by_length = sorted(wanted.items(), key=lambda item: len(item[1][0]) + len(item[1][1]))
    label = f"log-probs of {model.name}"
    with rows.writer() as writer, track(label, len(wanted)) as meter, precision(dtype):
        for batch in _token_batches(by_length):
            prompts, continuations = zip(*(pair for _, pair in batch), strict=True)
            values = continuation_logprobs(network, prompts, continuations).double().tolist()
            for ((example_id, candidate), _), value in zip(batch, values, strict=True):
                if not math.isfinite(value):
                    raise RunError(
                        f"{model.name}: log-prob of candidate {candidate} of example {example_id} is {value}"
                    )
            writer.add(
                [
                    {"example_id": key[0], "candidate_id": key[1], "logprob": value, "num_tokens": len(token_ids)}
                    for (key, (_, token_ids)), value in zip(batch, values, strict=True)
                ]
            )
            meter.advance(len(batch))


def _token_batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Consecutive items (sorted by length) whose padded size stays within BATCH_TOKENS."""
    batch: list[Any] = []
    for item in items:
        width = len(item[1][0]) + len(item[1][1])
        if batch and width * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
