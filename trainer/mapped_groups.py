"""The groups of a training in a file that all its processes map into memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution import processes
from cpo_pipe.data.schemas import CANDIDATE, GROUPS
from cpo_pipe.data.store import Rows
from cpo_pipe.trainer.distributed import agreed, wait
from cpo_pipe.trainer.scoring.group_table import CANDIDATE_FIELDS, Lengths, as_lists, one_array, with_candidates

FILE = "groups.arrow"
DIFFICULTY = "difficulty"
"""The column with each group's difficulty, for a curriculum."""
PAIR = "pair"
"""The column with the place of a pair's kind among the pairs asked for."""

_SCHEMA = pa.schema(
    [
        GROUPS.field("example_id"),
        GROUPS.field("prompt_ids"),
        pa.field("candidates", pa.list_(pa.struct(CANDIDATE_FIELDS))),
    ]
)
_PAIR = pa.field(PAIR, pa.int32())


@contextmanager
def mapped_groups(
    rows: Rows,
    examples: pa.Table,
    folder: Path,
    alone: bool,
    pairs: Sequence[tuple[str, str]] | None = None,
    difficulty: Callable[[pa.ListArray], Any] | None = None,
) -> Iterator[pa.Table]:
    """Write the groups of a selection, in its order, to a file in `folder` and yield them mapped into memory.

    Args:
        rows: the artifact of the groups.
        examples: the selection (EXAMPLES schema).
        folder: where the file is until the end; only the main process writes it.
        alone: whether to keep groups of K = 1.
        pairs: pairs of strategies, [chosen, rejected]; pairs of their candidates replace each group.
        difficulty: maps candidates (CANDIDATE schema) to their groups' difficulty, which becomes a column.

    Raises:
        RunError: a group is missing, or was made from other token ids than the example has now.
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
            wait()  # all processes map the file before one removes it
            yield groups
    finally:
        if processes.is_main():
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty if it also holds the state of a stopped training
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
    # A fixed name, so that the file of a killed process is overwritten. Only the main process writes, under a lock.
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
                    measured = difficulty(one_array(part["candidates"]))
                    kept = kept.append_column(DIFFICULTY, pa.array(measured, pa.float64()))
                writer.write_table(kept)
    scratch.replace(path)


def paired(groups: pa.Table, pairs: Sequence[tuple[str, str]]) -> pa.Table:
    """Return all pairs of candidates of the strategies [chosen, rejected] as groups of K = 2.

    The pairs of a group follow each other in the order of `pairs`; the column PAIR holds the place in `pairs`.
    """
    candidates = one_array(groups["candidates"])
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
    pair_lists = as_lists(pa.StructArray.from_arrays(columns, fields=fields), np.full(len(rows), 2))
    found = with_candidates(groups.take(pa.array(rows, pa.int64())), pair_lists)
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
                f"{name}: the group of example {example_id} has other token ids than the example: the chat template "
                "does not render the same text each time; use a deterministic template"
            )


def _without_texts(groups: pa.Table) -> pa.Table:
    candidates = one_array(groups["candidates"])
    kept = [candidates.flatten().field(field.name) for field in CANDIDATE_FIELDS]
    structs = pa.StructArray.from_arrays(kept, fields=CANDIDATE_FIELDS)
    size_G = pc.list_value_length(candidates).to_numpy()
    return with_candidates(groups, as_lists(structs, size_G)).cast(_SCHEMA)
