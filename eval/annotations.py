"""Human annotations: which of two outputs for one prompt people prefer. The judges' agreement with them is reported."""

import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.sources.arrow import values
from cpo_pipe.data.sources.rows import is_encodable, other_content
from cpo_pipe.eval.judges.base import SWAPPED, Pair, Winner

FORMATS = (".jsonl", ".csv", ".parquet")
COLUMNS = ("prompt", "output_a", "output_b", "winner")
_SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])

Key = tuple[str, str, str]
"""Prompt and both outputs, in NFC, the outputs sorted."""


@dataclass(frozen=True)
class Annotations:
    """What people prefer, by pair of outputs."""

    _votes: Mapping[Key, Counter[Winner]]
    sha256: str
    """Of the file."""

    def __len__(self) -> int:
        return len(self._votes)

    def winner(self, pair: Pair) -> Winner | None:
        """Return the winner of most annotations of a pair, a tie without a majority, or None without annotations."""
        key, swapped = _key(pair.case.prompt, pair.output_a, pair.output_b)
        votes = self._votes.get(key)
        if votes is None:
            return None
        (most, count), *rest = votes.most_common()
        winner: Winner = "tie" if rest and rest[0][1] == count else most
        return SWAPPED[winner] if swapped else winner


def read_annotations(path: Path, hash_file: Callable[[Path], str]) -> Annotations:
    """Return the annotations in a file of `prompt`, `output_a`, `output_b` and `winner` (`a`, `b` or `tie`).

    A pair may have several annotations, with its outputs in either order.

    Raises:
        InputError: the file is missing or cannot be read, lacks a column, or a winner is something else.
    """
    if path.suffix.lower() not in FORMATS:
        raise _error(path, f"the suffix {path.suffix!r} is not one of {', '.join(FORMATS)}; convert the file")
    if not path.is_file():
        raise _error(path, f"no such file; give the path of a {', '.join(FORMATS)} file")
    votes: dict[Key, Counter[Winner]] = {}
    table = _read(path)
    columns = zip(*(values(table.column(name)) for name in COLUMNS), strict=True)
    for number, row in enumerate((dict(zip(COLUMNS, row, strict=True)) for row in columns), 1):
        if absent := [name for name in COLUMNS if row[name] is None]:
            raise _error(path, f"row {number} has no {absent[0]}")
        if bad := [name for name in COLUMNS if not is_encodable(row[name])]:
            raise _error(path, f"{bad[0]} in row {number} is not UTF-8; save the file as UTF-8")
        if row["winner"] not in SWAPPED:
            raise _error(path, f"winner is {reprlib.repr(row['winner'])} in row {number}: must be a, b or tie")
        key, swapped = _key(row["prompt"], row["output_a"], row["output_b"])
        winner: Winner = SWAPPED[row["winner"]] if swapped else row["winner"]
        votes.setdefault(key, Counter())[winner] += 1
    return Annotations(votes, hash_file(path))


def _key(prompt: str, output_a: str, output_b: str) -> tuple[Key, bool]:
    """Return the key of a pair, and whether its outputs are swapped in it."""
    prompt, a, b = (unicodedata.normalize("NFC", text) for text in (prompt, output_a, output_b))
    return (prompt, *sorted((a, b))), a > b  # type: ignore[return-value]


def _read(path: Path) -> pa.Table:
    """Return the four columns, as texts."""
    block = path.stat().st_size + 1  # both readers fail on a block that ends within a row
    try:
        if path.suffix.lower() != ".parquet" and (content := other_content(path)):
            raise _error(path, f"contains {content}; save it as text in UTF-8")
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        elif path.suffix.lower() == ".csv":
            table = pa.csv.read_csv(
                path,
                read_options=pa.csv.ReadOptions(block_size=block),
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=_SCHEMA, check_utf8=False),
            )
        else:
            table = pa.json.read_json(
                path,
                read_options=pa.json.ReadOptions(block_size=block),
                parse_options=pa.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
            )
        if absent := [name for name in COLUMNS if name not in table.column_names]:
            raise _error(path, f"no column {absent[0]}; the file needs {', '.join(COLUMNS)}")
        return table.select(COLUMNS).cast(_SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise _error(path, f"cannot be read ({cause(error)})") from error


def _error(path: Path, fault: str) -> InputError:
    return InputError(f"evaluate.annotations {path}: {fault}")
