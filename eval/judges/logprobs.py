"""Log-probs of token sequences after others, for the judges that run a model here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models import Model

Logprobs = Callable[[Model, pa.Table], Sequence[float]]
"""Of a model and groups (`example_id`, `prompt_ids`, `candidates` of `candidate_id` and `token_ids`; none twice): each
candidate's log-prob after its prompt, summed, in nats; float32 arithmetic."""

_GROUPS = pa.schema([
    ("example_id", pa.string()), ("prompt_ids", pa.list_(pa.int32())),
    ("candidates", pa.list_(pa.struct([("candidate_id", pa.string()), ("token_ids", pa.list_(pa.int32()))]))),
])  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What a model is to score: token sequences after a prompt."""

    example_id: str
    prompt_ids: Sequence[int]
    continuations: Sequence[Sequence[int]]


def summed(logprobs: Logprobs, model: Model, wanted: Sequence[Scored]) -> list[list[float]]:
    """Of each that is wanted its continuations' log-probs, summed, in nats. What stands twice is computed once."""
    groups: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], float]] = {}
    for one in wanted:
        group = groups.setdefault((one.example_id, tuple(one.prompt_ids)), {})
        group |= {tuple(token_ids): 0.0 for token_ids in one.continuations}
    rows = [
        {"example_id": example_id, "prompt_ids": prompt_ids,
         "candidates": [{"candidate_id": candidate_id(prompt_ids, ids), "token_ids": ids} for ids in group]}
        for (example_id, prompt_ids), group in groups.items()
    ]  # fmt: skip
    values = iter(logprobs(model, pa.Table.from_pylist(rows, schema=_GROUPS)) if rows else ())
    for group in groups.values():
        for token_ids in group:
            group[token_ids] = float(next(values))
    return [
        [groups[one.example_id, tuple(one.prompt_ids)][tuple(token_ids)] for token_ids in one.continuations]
        for one in wanted
    ]
