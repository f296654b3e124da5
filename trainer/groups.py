"""Groups as the trainer learns from them, and a batch of them as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpo_pipe.trainer.scoring.group_table import Ints, Lengths
from cpo_pipe.trainer.scoring.probes import Probes


@dataclass(frozen=True)
class Group:
    """One prompt with its K candidates, the target first."""

    example_id: str
    prompt_ids: list[int]
    candidates: list[list[int]]
    """Token ids of each candidate."""
    ranks: list[int] | None
    """Position of each candidate in the preference order; None in unranked groups."""
    reference: list[float]
    """log π_ref of each candidate, summed over its tokens, in nats; empty without a reference."""


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """The groups of a table; a group is made each time it is indexed."""

    table: pa.Table
    """See trainer/scoring/group_table.py."""
    rows: Ints
    """Rows of the table, in order."""
    bounds: Ints
    """Offsets of each group's candidates among all of the table, and the end of the last."""
    reference_C: NDArray[np.float64] | None
    """log π_ref of all candidates of the table; None without a reference."""

    @classmethod
    def of(cls, table: pa.Table, reference_C: NDArray[np.float64] | None = None) -> "Groups":
        """Return all groups of a table."""
        return cls(table, np.arange(table.num_rows), Lengths.of(table).bounds(), reference_C)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Group: ...

    @overload
    def __getitem__(self, place: "slice | Ints") -> "Groups": ...

    def __getitem__(self, place: "int | slice | Ints") -> "Group | Groups":
        if not isinstance(place, int):
            return replace(self, rows=self.rows[place])
        row = self.rows[place]
        (found,) = self.table.slice(row, 1).to_pylist()
        candidates = found["candidates"]
        ranks = [candidate.get("rank") for candidate in candidates]
        return Group(
            found["example_id"],
            found["prompt_ids"],
            [candidate["token_ids"] for candidate in candidates],
            None if None in ranks else ranks,
            [] if self.reference_C is None else self.reference_C[self.bounds[row] : self.bounds[row + 1]].tolist(),
        )


@dataclass(frozen=True)
class Data:
    """The groups of a training."""

    groups: Sequence[Group]
    validation: Sequence[Group]
    """Measured, not trained on."""
    probes: Probes
    """Groups on which the self-check compares attention backends."""
    difficulty_G: NDArray[np.float64] | None = None
    """Difficulty of the groups trained on, for a curriculum."""


@dataclass(frozen=True)
class Batch:
    """Groups padded to the largest K. Shapes: G groups, K candidates."""

    mask_GK: Tensor
    reference_GK: Tensor
    """0 without a reference."""
    tokens_GK: Tensor
    rank_GK: Tensor


def collate(groups: Sequence[Group], device: torch.device) -> Batch:
    """Return the tensors that objectives need beside the policy's log-probs."""
    shape = len(groups), max(len(group.candidates) for group in groups)
    mask, rank = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    logprob, tokens = torch.zeros(shape), torch.ones(shape)
    for row, group in enumerate(groups):
        count = len(group.candidates)
        mask[row, :count] = True
        if group.reference:
            logprob[row, :count] = torch.tensor(group.reference)
        tokens[row, :count] = torch.tensor([float(len(ids)) for ids in group.candidates])
        rank[row, :count] = torch.tensor(group.ranks if group.ranks is not None else range(count))
    return Batch(mask.to(device), logprob.to(device), tokens.to(device), rank.to(device))
