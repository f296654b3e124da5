"""Groups as Arrow tables, so that a million groups are a few arrays.

Columns: `example_id`, `prompt_ids`, and `candidates`, structs of `token_ids` and, where they are needed, `candidate_id`
and `rank`. Shapes: G groups, C candidates of all groups together, in the order of the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.schemas import CANDIDATE

TokenGroup = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Token ids of a prompt and of its candidates."""
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

CANDIDATE_FIELDS = [CANDIDATE.field(name) for name in ("candidate_id", "token_ids", "rank")]


@dataclass(frozen=True)
class Lengths:
    """Number of tokens of prompts and candidates."""

    prompt_G: Ints
    size_G: Ints
    """Candidates of each group (K)."""
    candidate_C: Ints

    @classmethod
    def of(cls, groups: pa.Table) -> "Lengths":
        """Return the lengths of a table of groups."""
        token_ids = pc.struct_field(pc.list_flatten(groups["candidates"]), "token_ids")
        columns = groups["prompt_ids"], groups["candidates"], token_ids
        return cls(*(pc.list_value_length(column).to_numpy().astype(np.int64) for column in columns))

    def bounds(self) -> Ints:
        """Return where each group's candidates begin among all, and the end of the last group, shape (G + 1,)."""
        return offsets(self.size_G)

    def longest_G(self) -> Ints:
        """Return the tokens of each group's prompt with its longest candidate, shape (G,)."""
        return self.prompt_G + np.maximum.reduceat(self.candidate_C, self.bounds()[:-1])


@dataclass(frozen=True)
class Extremes:
    """The largest sizes in a table of groups, which a model must have room for."""

    longest: int
    """Tokens of the longest prompt with its candidate."""
    longest_in: str
    """Its example id."""
    largest: int
    """The largest token id."""
    largest_in: str

    @classmethod
    def of(cls, groups: pa.Table) -> "Extremes":
        """Return the sizes of a table of at least one group."""
        longest_G = Lengths.of(groups).longest_G()
        largest_G = np.concatenate([_largest_ids(batch) for batch in groups.to_batches()])
        ids, longest, largest = groups["example_id"], int(longest_G.argmax()), int(largest_G.argmax())
        return cls(int(longest_G[longest]), ids[longest].as_py(), int(largest_G[largest]), ids[largest].as_py())


def _largest_ids(groups: pa.RecordBatch) -> Ints:
    """Return the largest token id of each group, shape (G,)."""
    lengths = Lengths.of(pa.Table.from_batches([groups]))
    token_ids = groups["candidates"].flatten().field("token_ids").flatten().to_numpy()
    first_tokens = offsets(lengths.candidate_C)[lengths.bounds()[:-1]]
    return np.maximum(
        np.maximum.reduceat(token_ids, first_tokens),
        np.maximum.reduceat(groups["prompt_ids"].flatten().to_numpy(), offsets(lengths.prompt_G)[:-1]),
    )


def restricted(groups: pa.Table, wanted_C: Flags) -> pa.Table:
    """Return the groups with only their `wanted_C` candidates; groups without any are left out."""
    groups = groups.combine_chunks()
    candidates = one_array(groups["candidates"])
    parents = pc.list_parent_indices(candidates).to_numpy()
    count_G = np.bincount(parents[wanted_C], minlength=len(candidates))
    kept = as_lists(candidates.flatten().filter(pa.array(wanted_C)), count_G)
    return with_candidates(groups, kept).filter(pa.array(count_G > 0))


def candidate_keys(groups: pa.Table) -> pa.Table:
    """Return `example_id` and `candidate_id` of all candidates, C rows."""
    candidates = one_array(groups["candidates"])
    return pa.table(
        {
            "example_id": one_array(groups["example_id"]).take(pc.list_parent_indices(candidates)),
            "candidate_id": candidates.flatten().field("candidate_id"),
        }
    )


def targets(examples: pa.Table, identified: bool = False) -> pa.Table:
    """Return examples as groups of one candidate, the target; `identified` adds its `candidate_id`."""
    kept = [
        field
        for field in CANDIDATE_FIELDS
        if field.name == "token_ids" or (identified and field.name == "candidate_id")
    ]
    chunks = []
    for batch in examples.select(["prompt_ids", "target_ids"]).to_batches():
        columns = {"token_ids": batch["target_ids"].cast(CANDIDATE.field("token_ids").type)}
        if identified:
            pairs = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            columns["candidate_id"] = pa.array([candidate_id(*pair) for pair in pairs], pa.string())
        structs = pa.StructArray.from_arrays([columns[field.name] for field in kept], fields=kept)
        chunks.append(as_lists(structs, np.ones(len(structs), np.int64)))
    column = pa.chunked_array(chunks, pa.list_(pa.struct(kept)))
    return examples.select(["example_id", "prompt_ids"]).append_column("candidates", column)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as a single array; copies only if it has several chunks."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def as_lists(values: pa.Array, sizes: Ints) -> pa.ListArray:
    """Return consecutive values as lists of these sizes."""
    return pa.ListArray.from_arrays(offsets(sizes).astype(np.int32), values)


def with_candidates(groups: pa.Table, candidates: pa.ListArray) -> pa.Table:
    """Return the groups with other candidates."""
    return groups.select(["example_id", "prompt_ids"]).append_column("candidates", candidates)


def offsets(sizes: Ints) -> Ints:
    """Return where each of consecutive lists of these sizes begins, and the end of the last one, shape (n + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes)])
