"""Rows as a source has them, rows that cannot be read, and what all formats check."""

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.text import listed

TEXT_COLUMN = "text"
"""The one column of a source of plain articles."""


@dataclass(frozen=True)
class Row:
    """A row as the source has it. Nested values (conversations) are lists and mappings."""

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


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a value that Python cannot hold."""

    reason: str


@dataclass(frozen=True)
class ColumnRequest:
    """The columns that a reader of a source asks for, and how messages name the source."""

    source: str
    """The key of the recipe and its value."""
    required: Mapping[str, str]
    """Columns that must be there, by the key of the column mapping that names them."""
    optional: Collection[str] | None = ()
    """Further columns to read if they exist; None: all columns."""
    columns_key: str | None = "data.columns"
    """The column mapping in the recipe; None: the names are fixed."""

    def error(self, fault: str) -> InputError:
        """Return an error that names the source."""
        return InputError(f"{self.source}: {fault}")

    def within(self, label: str) -> "ColumnRequest":
        """Return the request to one of the source's files."""
        return replace(self, source=f"{self.source}: {label}")

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the requested columns among those of a table.

        Raises:
            InputError: a required column is missing, or a requested one is duplicate.
        """
        self.require(names)
        wanted = None if self.optional is None else {*self.required.values(), *self.optional}
        chosen = [name for name in names if wanted is None or name in wanted]
        twice = next((name for place, name in enumerate(chosen) if name in chosen[:place]), None)
        if twice is not None:
            raise self.error(f"has two columns named {twice!r}; rename or remove one")
        return chosen

    def require(self, names: Sequence[str]) -> None:
        """Check that the required columns are among those of a table.

        Raises:
            InputError: one is missing.
        """
        missing = {field: column for field, column in self.required.items() if column not in names}
        if not missing:
            return
        key = self.columns_key
        shown = ", ".join(f"{column!r}" + (f" ({key}.{field})" if key else "") for field, column in missing.items())
        first = next(iter(missing))
        fix = f"set {key}.{first} to the one that is meant" if key else "rename the ones that are meant"
        raise self.error(f"no column {shown}; the columns there are {listed(names)}; {fix}")


def text_fault(value: object, name: str) -> tuple[str, str] | None:
    """Return the rule that a value breaks which must be text, and the detail for messages; None if it breaks none.

    Args:
        value: the value.
        name: of its column, for messages.
    """
    if value is None:
        return "missing field", name
    if isinstance(value, Unreadable):
        return value.reason, name
    if not isinstance(value, str):
        return "not text", f"{name} has type {type(value).__name__}: {reprlib.repr(value)}"
    return None if is_encodable(value) else ("not UTF-8", f"{name} is {value}")


def is_encodable(text: str) -> bool:
    """Return whether a text has no lone surrogates, which no encoding and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
