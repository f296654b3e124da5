"""Log-probabilities of token sequences after a prompt, for the judges that run a local model."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store

_GROUPS = pa.schema([
    ("example_id", pa.string()), ("prompt_ids", pa.list_(pa.int32())),
    ("candidates", pa.list_(pa.struct([("candidate_id", pa.string()), ("token_ids", pa.list_(pa.int32()))]))),
])  # fmt: skip


@dataclass(frozen=True)
class Continuations:
    """Token sequences after one prompt."""

    example_id: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[Sequence[int]]


def continuation_logprobs(
    store: Store, executor: Executor, model: Model, requests: Sequence[Continuations]
) -> list[list[float]]:
    """Return the summed log-probability of each continuation of each request, in nats; float32 arithmetic.

    Values are cached in the store. Duplicates are computed once.
    """
    groups: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], float]] = {}
    for request in requests:
        group = groups.setdefault((request.example_id, tuple(request.prompt_ids)), {})
        group |= {tuple(token_ids): 0.0 for token_ids in request.token_ids}
    if not groups:
        return []
    rows = [
        {"example_id": example_id, "prompt_ids": prompt_ids,
         "candidates": [{"candidate_id": candidate_id(prompt_ids, ids), "token_ids": ids} for ids in group]}
        for (example_id, prompt_ids), group in groups.items()
    ]  # fmt: skip
    from cpo_pipe.trainer.scoring.logprobs import cached_logprobs, read_logprobs

    table = pa.Table.from_pylist(rows, schema=_GROUPS)
    values = iter(read_logprobs(cached_logprobs(store, model, "float32", table, executor), table).tolist())
    for group in groups.values():
        for token_ids in group:
            group[token_ids] = next(values)
    return [
        [groups[request.example_id, tuple(request.prompt_ids)][tuple(token_ids)] for token_ids in request.token_ids]
        for request in requests
    ]
