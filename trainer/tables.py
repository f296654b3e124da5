"""Groups as Arrow tables, so that a million of them are arrays, and in a training a file that is mapped into memory.

Columns: `example_id`, `prompt_ids`, and `candidates`, structs of `token_ids` and, where they are needed, `candidate_id`
and `rank`; of pairs also PAIR, the place of their kind among those asked for; for a curriculum DIFFICULTY. Shapes: G
groups, C candidates of all of them together, in the order of the groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data import processes
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.schemas import CANDIDATE, GROUPS
from cpo_pipe.data.store import Rows
from cpo_pipe.trainer.parallel import agreed, wait
from cpo_pipe.trainer.scorer import Probes
from cpo_pipe.trainer.trees import Texts, pack_trees

FILE = "groups.arrow"
DIFFICULTY = "difficulty"
PAIR = "pair"

TREES = 64
"""How many of the groups with most tokens are packed to find the one with the largest tree."""

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_KEPT = [CANDIDATE.field(name) for name in ("candidate_id", "token_ids", "rank")]
_SCHEMA = pa.schema(
    [GROUPS.field("example_id"), GROUPS.field("prompt_ids"), pa.field("candidates", pa.list_(pa.struct(_KEPT)))]
)
_PAIR = pa.field(PAIR, pa.int32())


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and candidates."""

    prompt_G: Ints
    size_G: Ints
    """K of each group."""
    candidate_C: Ints

    @classmethod
    def of(cls, groups: pa.Table) -> "Lengths":
        """Of a table of groups."""
        token_ids = pc.struct_field(pc.list_flatten(groups["candidates"]), "token_ids")
        columns = groups["prompt_ids"], groups["candidates"], token_ids
        return cls(*(pc.list_value_length(column).to_numpy().astype(np.int64) for column in columns))

    def bounds(self) -> Ints:
        """Where each group's candidates begin among all, and where those of the last one end, shape (G + 1,)."""
        return _bounds(self.size_G)

    def longest_G(self) -> Ints:
        """Of each group the tokens of the prompt with the longest candidate."""
        return self.prompt_G + np.maximum.reduceat(self.candidate_C, self.bounds()[:-1])


@dataclass(frozen=True)
class Extremes:
    """What of all groups a model must have room for."""

    longest: int
    """Tokens of a prompt with its candidate."""
    longest_in: str
    """Its example id."""
    largest: int
    """Token id."""
    largest_in: str

    @classmethod
    def of(cls, groups: pa.Table) -> "Extremes":
        """Of a table of at least one group."""
        longest_G = Lengths.of(groups).longest_G()
        largest_G = np.concatenate([_largest_ids(batch) for batch in groups.to_batches()])
        ids, longest, largest = groups["example_id"], int(longest_G.argmax()), int(largest_G.argmax())
        return cls(int(longest_G[longest]), ids[longest].as_py(), int(largest_G[largest]), ids[largest].as_py())


def _largest_ids(groups: pa.RecordBatch) -> Ints:
    """The largest token id in each group."""
    lengths = Lengths.of(pa.Table.from_batches([groups]))
    token_ids = groups["candidates"].flatten().field("token_ids").flatten().to_numpy()
    first_tokens = _bounds(lengths.candidate_C)[lengths.bounds()[:-1]]
    return np.maximum(
        np.maximum.reduceat(token_ids, first_tokens),
        np.maximum.reduceat(groups["prompt_ids"].flatten().to_numpy(), _bounds(lengths.prompt_G)[:-1]),
    )


def probes(groups: pa.Table, wanted_C: Flags | None = None) -> Probes:
    """What decides how to compute these groups, or of them the `wanted_C` candidates; at least one."""
    lengths = Lengths.of(groups)
    wanted_C = np.ones(len(lengths.candidate_C), np.bool_) if wanted_C is None else wanted_C
    bounds = lengths.bounds()
    count_G = np.add.reduceat(wanted_C, bounds[:-1], dtype=np.int64)
    longest_G = lengths.prompt_G + np.maximum.reduceat(lengths.candidate_C * wanted_C, bounds[:-1])
    row_C = (np.repeat(lengths.prompt_G, lengths.size_G) + lengths.candidate_C)[wanted_C]
    there = np.flatnonzero(count_G)
    by_length = there[np.argsort(longest_G[there], kind="stable")]
    tokens_G = lengths.prompt_G + np.add.reduceat(lengths.candidate_C * wanted_C, bounds[:-1])
    places = sorted({len(there) - 1, (len(there) - 1) // 2, 0}, reverse=True)

    def texts(group: int) -> Texts:
        (found,) = restricted(groups.slice(group, 1), wanted_C[bounds[group] : bounds[group + 1]]).to_pylist()
        return found["prompt_ids"], [candidate["token_ids"] for candidate in found["candidates"]]

    largest, most = -1, 0
    for group in there[np.argsort(-tokens_G[there], kind="stable")][:TREES].tolist():
        if tokens_G[group] <= most:  # candidates share tokens: a tree has at most so many
            break
        tokens = pack_trees([texts(group)]).tokens()
        largest, most = (group, tokens) if tokens > most else (largest, most)
    chosen = [texts(group) for group in dict.fromkeys([*by_length[places].tolist(), largest])]
    rows = int(row_C.min()) - 1, int(row_C.max()) - 1
    return Probes(tuple(chosen), rows, int(count_G.max()), int(tokens_G[there].max()))


def restricted(groups: pa.Table, wanted_C: Flags) -> pa.Table:
    """The groups with the `wanted_C` of their candidates only, and without those that have none of them."""
    groups = groups.combine_chunks()
    candidates = _one_array(groups["candidates"])
    parents = pc.list_parent_indices(candidates).to_numpy()
    count_G = np.bincount(parents[wanted_C], minlength=len(candidates))
    kept = _lists(candidates.flatten().filter(pa.array(wanted_C)), count_G)
    return _with_candidates(groups, kept).filter(pa.array(count_G > 0))


def candidate_keys(groups: pa.Table) -> pa.Table:
    """`example_id` and `candidate_id` of all candidates, C rows."""
    candidates = _one_array(groups["candidates"])
    return pa.table(
        {
            "example_id": _one_array(groups["example_id"]).take(pc.list_parent_indices(candidates)),
            "candidate_id": candidates.flatten().field("candidate_id"),
        }
    )


def targets(examples: pa.Table, identified: bool = False) -> pa.Table:
    """Examples as groups of their target alone; its `candidate_id` is computed where it is asked for."""
    kept = [field for field in _KEPT if field.name == "token_ids" or (identified and field.name == "candidate_id")]
    chunks = []
    for batch in examples.select(["prompt_ids", "target_ids"]).to_batches():
        columns = {"token_ids": batch["target_ids"].cast(CANDIDATE.field("token_ids").type)}
        if identified:
            pairs = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            columns["candidate_id"] = pa.array([candidate_id(*pair) for pair in pairs], pa.string())
        structs = pa.StructArray.from_arrays([columns[field.name] for field in kept], fields=kept)
        chunks.append(_lists(structs, np.ones(len(structs), np.int64)))
    column = pa.chunked_array(chunks, pa.list_(pa.struct(kept)))
    return examples.select(["example_id", "prompt_ids"]).append_column("candidates", column)


@contextmanager
def mapped_groups(
    rows: Rows,
    examples: pa.Table,
    folder: Path,
    alone: bool,
    pairs: Sequence[tuple[str, str]] | None = None,
    difficulty: Callable[[pa.ListArray], Any] | None = None,
) -> Iterator[pa.Table]:
    """The groups of a selection, in its order, in a file in `folder` that all processes of a training map into memory.

    Args:
        rows: the groups' artifact.
        examples: the selection (EXAMPLES schema).
        folder: for the file, which is removed again; the main process writes there alone.
        alone: whether groups of K = 1 are wanted.
        pairs: which pairs of candidates, by strategy, become groups of their own in the group's place.
        difficulty: from candidates (CANDIDATE schema) to the groups' difficulty, which becomes a column.

    Raises:
        RunError: a group is missing, or was made from other token ids than the example now has.
    """
    path, error = folder / FILE, None
    if processes.is_main():
        try:
            _write(path, rows, examples, alone, pairs, difficulty)
        except (InputError, RunError) as raised:
            error = raised
    error = agreed(error)
    if error is not None:
        raise error
    try:
        with pa.memory_map(str(path)) as source:
            groups = pa.ipc.open_file(source).read_all()
            wait()  # no process removes the file before all have it
            yield groups
    finally:
        if processes.is_main():
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the state of a stopped training is there, too
                folder.rmdir()


def _write(
    path: Path,
    rows: Rows,
    examples: pa.Table,
    alone: bool,
    pairs: Sequence[tuple[str, str]] | None,
    difficulty: Callable[[pa.ListArray], Any] | None,
) -> None:
    absent = examples.num_rows - int(rows.contains(examples.select(["example_id"])).sum())
    if absent:
        raise RunError(f"{rows.name}: {absent} groups of the selection are missing")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: what a killed process left is written over. Only the main process writes, under the product's lock.
    scratch = path.with_name(f".tmp-{path.name}")
    schema = _SCHEMA if pairs is None else _SCHEMA.append(_PAIR)
    schema = schema if difficulty is None else schema.append(pa.field(DIFFICULTY, pa.float64()))
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        start = 0
        for part in rows.batches(examples["example_id"]):
            _check_token_ids(rows.name, part, examples.slice(start, part.num_rows))
            start += part.num_rows
            part = part if pairs is None else paired(part, pairs)
            part = part.filter(pc.greater(pc.list_value_length(part["candidates"]), 0 if alone else 1))
            if part.num_rows:
                kept = _without_texts(part)
                if pairs is not None:
                    kept = kept.append_column(_PAIR, part[PAIR])
                if difficulty is not None:
                    measured = difficulty(_one_array(part["candidates"]))
                    kept = kept.append_column(DIFFICULTY, pa.array(measured, pa.float64()))
                writer.write_table(kept)
    scratch.replace(path)


def paired(groups: pa.Table, pairs: Sequence[tuple[str, str]]) -> pa.Table:
    """Pairs of the groups' candidates as groups of K = 2: of each [chosen, rejected] of strategies all that there are.

    A group's pairs stand together, in the order of `pairs`, of which PAIR is the place.
    """
    candidates = _one_array(groups["candidates"])
    flat, bounds = candidates.flatten(), Lengths.of(groups).bounds()
    strategies = flat.field("strategy").to_pylist()
    rows: list[int] = []
    taken: list[int] = []
    kinds: list[int] = []
    for row, (start, end) in enumerate(pairwise(bounds.tolist())):
        places = {label: [p for p in range(start, end) if strategies[p] == label] for label in strategies[start:end]}
        for kind, (chosen, rejected) in enumerate(pairs):
            for pair in product(places.get(chosen, ()), places.get(rejected, ())):
                rows.append(row)
                taken += pair
                kinds.append(kind)
    taken_C = flat.take(pa.array(taken, pa.int64()))
    ranks = pa.array([0, 1] * len(rows), CANDIDATE.field("rank").type)
    fields = list(CANDIDATE)
    columns = [ranks if field.name == "rank" else taken_C.field(field.name) for field in fields]
    lists = _lists(pa.StructArray.from_arrays(columns, fields=fields), np.full(len(rows), 2))
    found = _with_candidates(groups.take(pa.array(rows, pa.int64())), lists)
    return found.append_column(_PAIR, pa.array(kinds, _PAIR.type))


def _check_token_ids(name: str, groups: pa.Table, examples: pa.Table) -> None:
    theirs = groups["prompt_ids"], pc.struct_field(pc.list_element(groups["candidates"], 0), "token_ids")
    ours = examples["prompt_ids"], examples["target_ids"]
    if all(then.cast(now.type).equals(now) for then, now in zip(theirs, ours, strict=True)):
        return
    columns = (column.to_pylist() for column in (examples["example_id"], *theirs, *ours))
    for example_id, prompt, target, prompt_now, target_now in zip(*columns, strict=True):
        if (prompt, target) != (prompt_now, target_now):
            raise RunError(
                f"{name}: the group of example {example_id} has other token ids than the example: its chat template "
                "does not render the same text each time; use a template that does"
            )


def _without_texts(groups: pa.Table) -> pa.Table:
    candidates = _one_array(groups["candidates"])
    kept = [candidates.flatten().field(field.name) for field in _KEPT]
    structs = pa.StructArray.from_arrays(kept, fields=_KEPT)
    size_G = pc.list_value_length(candidates).to_numpy()
    return _with_candidates(groups, _lists(structs, size_G)).cast(_SCHEMA)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists(values: pa.Array, sizes: Ints) -> pa.ListArray:
    return pa.ListArray.from_arrays(_bounds(sizes).astype(np.int32), values)


def _with_candidates(groups: pa.Table, candidates: pa.ListArray) -> pa.Table:
    return groups.select(["example_id", "prompt_ids"]).append_column("candidates", candidates)


def _bounds(sizes: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes)])
