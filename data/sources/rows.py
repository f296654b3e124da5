"""Rows as a source has them, rows that cannot be read, and what all formats check."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.text import listed

TEXT_COLUMN = "text"
"""The one column of a source of plain articles."""
_CONTENTS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Leading bytes of files that are not text in UTF-8."""


@dataclass(frozen=True)
class Row:
    """A row as the source has it."""

    source: str
    """Its place: `file:line`."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A row that was refused."""

    source: str
    reason: str
    detail: str
    """The value that broke the rule."""
    example_id: str | None = None


Stream = Iterator[Row | Refusal]


def require(source: str, required: Mapping[str, str], there: Sequence[str]) -> None:
    """Check that the columns that `data.columns` names are among those that are `there`.

    Raises:
        InputError: one is missing.
    """
    missing = {field: column for field, column in required.items() if column not in there}
    if not missing:
        return
    if list(there) == [TEXT_COLUMN] and source.endswith(".txt"):
        raise InputError(f"data.source {source}: a .txt file holds articles, not pairs; set data.preset: text")
    named = ", ".join(f"{column!r} (data.columns.{field})" for field, column in missing.items())
    raise InputError(
        f"data.source {source}: no column {named}; the columns there are {listed(there)}; "
        f"set data.columns.{next(iter(missing))} to the one that is meant"
    )


def duplicate(names: Sequence[str]) -> str | None:
    """Return the first name that is in a list more than once, or None."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def is_encodable(text: str) -> bool:
    """Return whether a text has no lone surrogates, which no encoding and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def other_content(path: Path) -> str | None:
    """Return what is in a file that is not text in UTF-8, where its first bytes say so."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((content for magic, content in _CONTENTS.items() if start.startswith(magic)), None)
