"""Human annotations: which of two outputs for one prompt people prefer. The judges' agreement with them is reported."""

import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Refusal, Row, text_fault
from cpo_pipe.data.text import one_line
from cpo_pipe.eval.judges.base import SWAPPED, Pair, Winner

COLUMNS = ("prompt", "output_a", "output_b", "winner")

Key = tuple[str, str, str]
"""Prompt and both outputs, in NFC, the outputs sorted."""


@dataclass(frozen=True)
class Annotations:
    """What people prefer, by pair of outputs."""

    _votes: Mapping[Key, Counter[Winner]]
    fingerprint: str
    """Hash of the content."""

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


def read_annotations(name: str, hash_file: Callable[[Path], str]) -> Annotations:
    """Return the annotations in a file of `prompt`, `output_a`, `output_b` and `winner` (`a`, `b` or `tie`).

    A pair may have several annotations, with its outputs in either order.

    Raises:
        InputError: the file is missing or cannot be read, lacks a column, or a row breaks a rule.
    """
    source = locate_source(name, key="evaluate.annotations", columns_key=None)
    votes: dict[Key, Counter[Winner]] = {}
    for row in source.read({column: column for column in COLUMNS}):
        if fault := _fault(row):
            reason, detail = fault
            raise source.request({}).error(f"{row.source}: {reason} ({one_line(detail, 200)}); correct the row")
        assert isinstance(row, Row)
        prompt, output_a, output_b, winner = (row.values[column] for column in COLUMNS)
        key, swapped = _key(prompt, output_a, output_b)
        votes.setdefault(key, Counter())[SWAPPED[winner] if swapped else winner] += 1
    return Annotations(votes, digest(source.identity(hash_file)))


def _fault(row: Row | Refusal) -> tuple[str, str] | None:
    """Return the rule that a row breaks, and the value that breaks it."""
    if isinstance(row, Refusal):
        return row.reason, row.detail
    for column in COLUMNS:
        if fault := text_fault(row.values.get(column), f"column {column}"):
            return fault
    winner = row.values["winner"]
    return None if winner in SWAPPED else ("not a winner", f"column winner is {reprlib.repr(winner)}, not a, b or tie")


def _key(prompt: str, output_a: str, output_b: str) -> tuple[Key, bool]:
    """Return the key of a pair, and whether its outputs are swapped in it."""
    prompt, a, b = (unicodedata.normalize("NFC", text) for text in (prompt, output_a, output_b))
    return (prompt, *sorted((a, b))), a > b  # type: ignore[return-value]
