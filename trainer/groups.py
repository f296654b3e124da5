"""Groups as the trainer reads them, and a batch of them as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.store import Rows


@dataclass(frozen=True)
class Group:
    """One prompt with its K candidates, the target first."""

    example_id: str
    prompt_ids: list[int]
    candidate_ids: list[str]
    candidates: list[list[int]]
    """Token ids of each candidate."""
    ranks: list[int] | None
    """Position of each candidate in the preference order; None in unranked groups."""

    def tokens(self) -> int:
        """Tokens of the longest prompt with its candidate."""
        return len(self.prompt_ids) + max(map(len, self.candidates))


def groups_from_examples(examples: pa.Table) -> list[Group]:
    """Groups of the target alone, as MLE trains on them."""
    columns = [examples[name].to_pylist() for name in ("example_id", "prompt_ids", "target_ids")]
    return [Group(key, prompt, [], [target], None) for key, prompt, target in zip(*columns, strict=True)]


def read_groups(rows: Rows, examples: pa.Table) -> list[Group]:
    """The groups of a selection (EXAMPLES schema), in its order.

    Raises:
        RunError: one is missing, or was made from other token ids than the example now has.
    """
    example_ids = examples["example_id"].to_pylist()
    found = [
        Group(
            row["example_id"],
            row["prompt_ids"],
            [candidate["candidate_id"] for candidate in row["candidates"]],
            [candidate["token_ids"] for candidate in row["candidates"]],
            None if row["candidates"][0]["rank"] is None else [c["rank"] for c in row["candidates"]],
        )
        for table in rows.batches(example_ids)
        for row in table.to_pylist()
    ]
    if len(found) != len(example_ids):
        raise RunError(f"{rows.name}: {len(example_ids) - len(found)} groups of the selection are missing")
    now = zip(examples["prompt_ids"].to_pylist(), examples["target_ids"].to_pylist(), strict=True)
    for group, (prompt_ids, target_ids) in zip(found, now, strict=True):
        if (group.prompt_ids, group.candidates[0]) != (prompt_ids, target_ids):
            raise RunError(
                f"{rows.name}: the group of example {group.example_id} has other token ids than the example: what "
                "renders the prompt is not the same each time (a date in the chat template?)"
            )
    return found


ReferenceLogprobs = Mapping[tuple[str, str], tuple[float, int]]
"""By example id and candidate id: log π_ref summed over tokens, and the number of tokens."""


def read_reference(rows: Rows, groups: Sequence[Group]) -> ReferenceLogprobs:
    """Reference log-probs of every candidate.

    Raises:
        RunError: one is missing; a missing log-prob is never 0.
    """
    table = rows.read([group.example_id for group in groups])
    columns = [table[name].to_pylist() for name in ("example_id", "candidate_id", "logprob", "num_tokens")]
    found = {(example, candidate): (value, n) for example, candidate, value, n in zip(*columns, strict=True)}
    for group in groups:
        for candidate in group.candidate_ids:
            if (group.example_id, candidate) not in found:
                raise RunError(f"{rows.name}: no log-prob of candidate {candidate} of example {group.example_id}")
    return found


@dataclass(frozen=True)
class Data:
    """What a training learns from."""

    groups: Sequence[Group]
    held_out: Sequence[Group]
    """Measured, not trained on."""
    reference: ReferenceLogprobs
    """log π_ref of the candidates of both; empty for mle."""


@dataclass(frozen=True)
class Batch:
    """Groups padded to the largest K. Shapes: G groups, K candidates."""

    mask_GK: Tensor
    reference_GK: Tensor
    tokens_GK: Tensor
    rank_GK: Tensor


def collate(groups: Sequence[Group], reference: ReferenceLogprobs, device: torch.device) -> Batch:
    """The tensors that the listwise losses need beside the policy's log-probs."""
    shape = len(groups), max(len(group.candidates) for group in groups)
    mask, rank = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    logprob, tokens = torch.zeros(shape), torch.ones(shape)
    for row, group in enumerate(groups):
        for column, candidate in enumerate(group.candidate_ids):
            mask[row, column] = True
            logprob[row, column], tokens[row, column] = reference[group.example_id, candidate]
            rank[row, column] = group.ranks[column] if group.ranks is not None else column
    return Batch(mask.to(device), logprob.to(device), tokens.to(device), rank.to(device))
