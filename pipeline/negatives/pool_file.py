"""Continuations in files, such as another model's outputs, and the texts that they have for each prompt."""

import hashlib
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import Field

from cpo_pipe.data.config import Section
from cpo_pipe.data.models import templates
from cpo_pipe.data.sources.rows import Refusal, Row, text_fault
from cpo_pipe.data.sources.source import Source
from cpo_pipe.data.text import abridged
from cpo_pipe.pipeline.prepare.rejected import listed_counts, places

_ROLES = {"prompt": "user", "text": "assistant"}
"""The role of the message in a column of conversations."""


class Columns(Section):
    """Which column of a file holds what."""

    prompt: str = Field(
        "prompt",
        description="column with the prompt, as in data.source, or one message of the user; a file with a column "
        "example_id is matched by that column",
    )
    context: str | None = Field(None, description="column with the prompt's context, where it is not in the prompt")
    text: str = Field("text", description="column with a continuation, a list of them, or one message of the assistant")


Found = tuple[str | None, str | Refusal]
"""The key of a continuation, where it is known, and its text, or why it has none."""


@dataclass(frozen=True)
class PoolFile:
    """A source of continuations. Prompt and continuation may each be a conversation of one message."""

    source: Source
    columns: Columns

    def check(self) -> None:
        """Read until the first valid row, to find faults of the whole file before other negatives are made.

        Raises:
            InputError: the file has no rows, lacks a column or cannot be read, or all rows are rejected.
        """
        rejected = Rejections()
        for _, text in self.continuations(self.match_column()):
            if not isinstance(text, Refusal):
                return
            rejected.add(text)
        if rejected.reasons:
            raise self.source.request({}).error(f"has no valid row; {rejected}")

    def match_column(self) -> str:
        """Return the column of the EXAMPLES schema to match rows by: `example_id` if the first row has it, or `prompt`.

        Raises:
            InputError: the file has no rows or cannot be read.
        """
        for row in self.source.read({}, ["example_id", self.columns.prompt, self.columns.text]):
            if isinstance(row, Row):
                return "example_id" if "example_id" in row.values else "prompt"
        return "prompt"

    def continuations(self, key: str) -> Iterator[Found]:
        """Yield the continuations, and the rows that have none because they break a rule, in the order of the file.

        Args:
            key: the column of the EXAMPLES schema that rows are matched by; see `match_column`.

        Raises:
            InputError: a column is missing from all rows, or the file cannot be read.
        """
        required = {"text": self.columns.text}
        if key == "prompt":
            context = {"context": self.columns.context} if self.columns.context is not None else {}
            required = {"prompt": self.columns.prompt, **context, **required}
        for row in self.source.read(required, ["example_id"]):
            if isinstance(row, Refusal):
                yield None, row
                continue
            owner = self._owner(row, key)
            if isinstance(owner, Refusal):
                yield None, owner
                continue
            texts = self._content(row, "text")
            for text in texts if isinstance(texts, list) else [texts]:
                yield owner, self._text(row, "text", text)

    def _owner(self, row: Row, key: str) -> str | Refusal:
        """Return the example id or the prompt, with its context, of a row."""
        owner = self._text(row, key, self._content(row, key))
        column = self.columns.context
        if key != "prompt" or isinstance(owner, Refusal) or column is None or row.values.get(column) is None:
            return owner
        context = self._text(row, "context", row.values[column])
        return context if isinstance(context, Refusal) else templates.with_context(owner, context)

    def _content(self, row: Row, field: str) -> Any:
        """Return the value of a column; of a conversation the content of its one message."""
        value: Any = row.values.get(self._column(field))
        if field not in _ROLES or not _is_conversation(value):
            return value
        if len(value) > 1 or value[0].get("role") != _ROLES[field]:
            roles = ", ".join(str(message.get("role")) for message in value)
            detail = f"{self._named(field)} is a conversation of {abridged(repr(roles), 60)}"
            return Refusal(row.source, f"not one message of the {_ROLES[field]}", detail)
        return value[0].get("content")

    def _text(self, row: Row, field: str, value: Any) -> str | Refusal:
        if isinstance(value, Refusal):
            return value
        fault = text_fault(value, self._named(field))
        return Refusal(row.source, *fault) if fault else str(value)

    def _column(self, field: str) -> str:
        return str(getattr(self.columns, field, field))  # the name of `example_id` is fixed

    def _named(self, field: str) -> str:
        setting = f" ({self.source.columns_key}.{field})" if hasattr(self.columns, field) else ""
        return f"column {self._column(field)}{setting}"


class Rejections:
    """Counts of rejected rows by reason, with the first row of each."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, Refusal] = {}

    def add(self, refusal: Refusal) -> None:
        """Count a rejected row."""
        self.reasons[refusal.reason] += 1
        self._first.setdefault(refusal.reason, refusal)

    def __str__(self) -> str:
        """Return the counts and the first rows, for messages."""
        counts = dict(self.reasons.most_common())
        seen = places([asdict(self._first[reason]) for reason in counts], None)
        return f"{self.reasons.total():,} rejected ({listed_counts(counts)}); {seen}"


class Continuations:
    """The first continuations that a file has for each of some keys.

    The texts are in a scratch file, since a million prompts with eleven continuations each take gigabytes. Only hashes
    of the keys and the texts' offsets are in memory.
    """

    def __init__(self, keys: Iterable[str], limit: int, found: Iterable[Found], is_control: Callable[[str], bool]):
        """Keep the first `limit` texts of each of the `keys`, and why a key has fewer."""
        self._number = {key: number for number, key in enumerate(dict.fromkeys(map(_short, keys)))}
        self._scratch = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this lives
        weakref.finalize(self, self._scratch.close)
        self._end = array("q", [0])
        owners, counts = array("i"), array("i", bytes(4 * len(self._number)))
        self.control_tokens = 0
        """Number of kept texts that contain control tokens."""
        self.rejections = Rejections()
        """Rejected rows of the file, also of other keys."""
        self.unmatched: str | None = None
        """The first key of the file that is not among `keys`."""
        self._refused: dict[int, list[Refusal]] = {}
        for key, text in found:
            number = self._number.get(_short(key)) if key is not None else None
            if isinstance(text, Refusal):
                self.rejections.add(text)
                if number is not None and len(refused := self._refused.setdefault(number, [])) < limit:
                    refused.append(text)
            elif number is None:
                self.unmatched = self.unmatched or key
            elif counts[number] < limit:
                counts[number] += 1
                owners.append(number)
                self.control_tokens += is_control(text)
                self._end.append(self._end[-1] + self._scratch.write(text.encode()))
        self.counts = np.array(counts, np.int64)
        """Number of kept texts of each key."""
        self._order = np.argsort(owners, kind="stable")
        self._first = np.cumsum(self.counts) - self.counts

    def text(self, key: str, k: int) -> str | None:
        """Return the k-th text of a key, from 0; None where the key has fewer."""
        number = self._number[_short(key)]
        if k >= self.counts[number]:
            return None
        place = self._order[self._first[number] + k]
        start, end = self._end[place], self._end[place + 1]
        self._scratch.seek(start)
        return self._scratch.read(end - start).decode()

    def refusal(self, key: str, k: int) -> Refusal | None:
        """Return the rejected row that could have been the k-th text of a key which has fewer, if there is one."""
        number = self._number[_short(key)]
        refused, place = self._refused.get(number, []), k - int(self.counts[number])
        return refused[place] if place < len(refused) else None


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages, as chat templates take them."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _short(key: str) -> bytes:
    """Return a hash that replaces a key in memory."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
