"""Collect encoded rows: examples in a scratch file, with only their keys in memory, and rejected rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.schemas import EXAMPLES, REJECTED
from cpo_pipe.data.sources.rows import Refusal
from cpo_pipe.pipeline.prepare.base import Encoded, Example, ShortEnd
from cpo_pipe.pipeline.prepare.parts import Part
from cpo_pipe.pipeline.prepare.rejected import check_rejected, places
from cpo_pipe.pipeline.prepare.rows import batches

BATCH = 1024
"""Rows of a row group."""

_UNSPLIT = EXAMPLES.remove(EXAMPLES.get_field_index("split")).append(pa.field("place", pa.string()))
_REJECTED = EXAMPLES.field("rejected")


class ExampleCollector:
    """Takes encoded examples, and writes them in the order of the split. A context manager while it takes them."""

    def __init__(self, source: str, split_seed: int, scratch: Path):
        """`source` is named in messages."""
        self.keys: list[tuple[str, str]] = []
        """Hash of the split key (the prompt, or the conversation), which orders the examples, and id."""
        self._splits: list[str | None] = []
        self._held: dict[str, str] = {}
        """The split of each hash of a split key in an official split."""
        self.reasons: Counter[str] = Counter()
        """Rejected rows by reason."""
        self.removed: dict[int, str] = {}
        """Examples that the recipe wants to be removed, by their place in `keys`, and why."""
        self.short_ends = self.control_tokens = self.written_ends = 0
        self.end_tokens: Counter[int] = Counter()
        """The tokens that end targets."""
        self.most_rejected = 0
        """The most rejected answers of an example."""
        self.merged = 0
        """Rows that only add rejected answers to an example."""
        self._rejected: list[dict[str, Any]] = []
        self._pending: list[Any] = []
        self._answers: dict[str, list[str]] = {}
        """Hashes of the rejected answers of the examples that have some."""
        self._rows: dict[str, list[int]] = {}
        """Where each example is in the scratch file, and the rows that add rejected answers to it."""
        self._written = 0
        self._source, self._split_seed, self._scratch = source, split_seed, scratch

    def __enter__(self) -> None:
        self._writer = pa.ipc.new_file(str(self._scratch), _UNSPLIT)

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, encoded: Encoded, part: Part) -> None:
        """Add an example of a part, reject a duplicate or a refused row, or count a short end.

        A prompt of an official split is in no other split. A row with the prompt and the target of an earlier one adds
        its rejected answers to that example.
        """
        if isinstance(encoded, ShortEnd):
            self.short_ends += 1
            return
        if isinstance(encoded, Example):
            key = digest([self._split_seed, encoded.split_key])
            if self._held.get(key, part.split) != part.split:
                ids = encoded.row["prompt"], encoded.row["example_id"]
                encoded = Refusal(encoded.source, f"prompt of the {self._held[key]} split", *ids)
        if isinstance(encoded, Example) and encoded.row["example_id"] in self._rows:
            if self._add_answers(encoded.row):
                return
            encoded = Refusal(encoded.source, "duplicate", encoded.row["prompt"], encoded.row["example_id"])
        if isinstance(encoded, Refusal):
            detail = encoded.detail[:200].encode(errors="backslashreplace").decode()[:200]
            self._rejected.append({**asdict(encoded), "detail": detail, "source": part.label + encoded.source})
            self.reasons[encoded.reason] += 1
            return
        self.control_tokens += encoded.has_control_tokens
        self.written_ends += encoded.had_eos
        if encoded.row["ends"]:
            self.end_tokens[encoded.row["target_ids"][-1]] += 1
        self.keys.append((key, encoded.row["example_id"]))
        self._splits.append(part.split)
        if part.split is not None:
            self._held[key] = part.split
        self._keep({**encoded.row, "source": part.name, "place": part.label + encoded.source})

    def _add_answers(self, row: Mapping[str, Any]) -> bool:
        """Add the rejected answers of a row to those of its example; return whether any is new."""
        known = self._answers.get(row["example_id"], [])
        new = [answer for answer in row["rejected"] or () if digest(answer["token_ids"]) not in known]
        if new:
            self.merged += 1
            self._keep({**row, "rejected": new})
        return bool(new)

    def _keep(self, row: Mapping[str, Any]) -> None:
        """Write a row to the scratch file."""
        if row["rejected"]:
            answers = self._answers.setdefault(row["example_id"], [])
            answers += [digest(answer["token_ids"]) for answer in row["rejected"]]
            self.most_rejected = max(self.most_rejected, len(answers))
        self._rows.setdefault(row["example_id"], []).append(self._written)
        self._written += 1
        self._pending.append(row)
        if len(self._pending) == BATCH:
            self._flush()

    def check(self, max_rejected: float, run_dir: Path | None) -> None:
        """Refuse a source with too many rejected rows or no examples; write the rejected rows to `run_dir`.

        Raises:
            InputError: too many rows were rejected, or no examples are left.
        """
        file = run_dir / "rejected.parquet" if run_dir is not None else None
        if file is not None:
            file.unlink(missing_ok=True)  # of an earlier attempt
        try:
            check_rejected(max_rejected, self._source, self.reasons, len(self.keys), self._rejected, file)
            if not self.keys:
                why = "all articles are shorter than half a chunk; lower data.chunk_tokens"
                if self._rejected:
                    why = f"all rows were rejected; {places(self._rejected, file)}"
                raise InputError(f"{self._source}: no examples are left: {why}")
        except InputError:
            if file is not None and self._rejected:
                self._write_rejected(file)
            raise

    def collected(self) -> pa.Table:
        """Return prompt, target and `place` of the examples in the order of `keys`; read from disk as they are used."""
        table = pa.ipc.open_file(pa.memory_map(str(self._scratch))).read_all().select(["prompt", "target", "place"])
        return table.take([self._rows[example_id][0] for _, example_id in self.keys]) if self.merged else table

    def group(self, labels: Sequence[int]) -> None:
        """Give all examples of a label the same place in the order, that of the one with the smallest id.

        Examples of official splits stay where they are.
        """
        chosen: dict[int, tuple[str, str]] = {}
        drawn = [row for row in range(len(self.keys)) if self.is_drawn(row)]
        for row in drawn:
            key, example_id = self.keys[row]
            chosen[labels[row]] = min(chosen.get(labels[row], (example_id, key)), (example_id, key))
        for row in drawn:
            self.keys[row] = chosen[labels[row]][1], self.keys[row][1]

    def is_drawn(self, row: int) -> bool:
        """Return whether the split of an example is drawn, not official."""
        return self._splits[row] is None

    def remove(self, reason: str, details: Mapping[int, str]) -> None:
        """Remove examples, by their place in `keys`; the recipe wants that, so they do not count as rejected."""
        rows = sorted(row for row in details if row not in self.removed)
        places = self.collected()["place"].take(pa.array(rows, pa.int64())).to_pylist()
        for row, place in zip(rows, places, strict=True):
            removed = {"source": place, "example_id": self.keys[row][1], "reason": reason, "detail": details[row][:200]}
            self._rejected.append(removed)
        self.removed |= dict.fromkeys(rows, reason)

    def ordered(self, split: str | None) -> list[int]:
        """Return the examples of an official split in order, or those whose split is drawn; places in `keys`."""
        places = (place for place, own in enumerate(self._splits) if own == split and place not in self.removed)
        return sorted(places, key=self.keys.__getitem__)

    def write(self, folder: Path, splits: Mapping[str, Sequence[int]]) -> None:
        """Write the examples of each split in order, and the rejected rows."""
        with pa.memory_map(str(self._scratch)) as scratch:
            unordered = pa.ipc.open_file(scratch).read_all()
            with pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd") as writer:
                for name, places_of_split in splits.items():
                    for batch in batches(places_of_split, BATCH):
                        found = [self._rows[self.keys[place][1]] for place in batch]
                        rows = unordered.take([first for first, *_ in found])
                        if self.merged:
                            rows = rows.drop("rejected").append_column(_REJECTED, _answers_in(unordered, found))
                        rows = rows.append_column("split", pa.array([name] * len(batch)))
                        writer.write_table(rows.select(EXAMPLES.names).cast(EXAMPLES))
        self._scratch.unlink()
        if self._rejected:  # `datasets` reads no table without rows
            self._write_rejected(folder / "rejected.parquet")

    def _write_rejected(self, file: Path) -> None:
        pq.write_table(pa.Table.from_pylist(self._rejected, schema=REJECTED), file)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=_UNSPLIT))
        self._pending = []


def _answers_in(unordered: pa.Table, rows: Sequence[Sequence[int]]) -> pa.Array:
    """Return the column `rejected` of examples, each with the answers of all its rows."""
    column = unordered["rejected"]
    answers = [[answer for row in of_example for answer in column[row].as_py() or ()] for of_example in rows]
    return pa.array([found or None for found in answers], _REJECTED.type)
