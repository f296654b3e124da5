"""Files of continuations, such as another model's outputs, and the texts that they have for each prompt."""

import hashlib
import json
import reprlib
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cpo_pipe.data.config import Section
from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import digest, distrust, sha256_once
from cpo_pipe.data.models import templates
from cpo_pipe.data.sources.arrow import Unreadable, batch_rows
from cpo_pipe.data.sources.rows import duplicate, is_encodable, other_content
from cpo_pipe.data.text import listed, nearest

FORMATS = (".jsonl", ".parquet", ".json")
_ROLES = {"prompt": "user", "text": "assistant"}
"""The role of the message in a column of conversations."""
READ_AT_ONCE = 1024
"""Rows of a Parquet file that are read at a time."""


class Columns(Section):
    """Which column of a file holds what."""

    prompt: str = Field(
        "prompt",
        description="column with the prompt, as in data.source, or one message of the user; a file with a column "
        "example_id is matched by that column",
    )
    context: str | None = Field(None, description="column with the prompt's context, where it is not in the prompt")
    text: str = Field("text", description="column with a continuation, a list of them, or one message of the assistant")


@dataclass(frozen=True)
class PoolFile:
    """A file of continuations: JSON lines, Parquet, or JSON that is one list of objects; or a folder of Parquet files.

    Prompt and continuation may each be a conversation of one message.
    """

    key: str
    """Its key in the recipe, for messages."""
    path: Path
    columns: Columns

    def sha256(self, hash_file: Callable[[Path], str]) -> str:
        """Return a hash of the file's bytes, or of the files of a folder.

        Raises:
            InputError: the file is missing, or its format is not supported.
        """
        if self.path.is_dir():
            return digest([hash_file(file) for file in self._folder()])
        if not self.path.is_file():
            raise self.error(f"no such file; give the path of a {', '.join(FORMATS)} file")
        if self.path.suffix.lower() not in FORMATS:
            raise self.error(f"the suffix {self.path.suffix!r} is not one of {', '.join(FORMATS)}; convert the file")
        return hash_file(self.path)

    def check_unchanged(self, sha256: str) -> None:
        """Verify before texts are read that the file still has this hash.

        Raises:
            InputError: it has another one.
        """
        if self.sha256(sha256_once) != sha256:
            for file in self._folder() if self.path.is_dir() else [self.path]:
                distrust(file)
            raise self.error(
                "has changed since it was hashed; restore it, or run the command again to use its new content"
            )

    def _folder(self) -> list[Path]:
        """Return the Parquet files of a folder and its subfolders, such as a data set of the hub."""
        files = sorted(self.path.rglob("*.parquet"))
        if not files:
            saved = (self.path / "state.json").is_file() or (self.path / "dataset_dict.json").is_file()
            fix = "; save_to_disk wrote it; export the data set with to_parquet" if saved else ""
            raise self.error(f"no *.parquet files in this folder{fix}")
        return files

    def error(self, fault: str) -> InputError:
        """Return an error that names the file, in one line."""
        return InputError(f"{self.key}.file {self.path}: {fault}")

    def check(self) -> None:
        """Read the first row, to find faults of the whole file before other negatives are made.

        Raises:
            InputError: the file has no rows or cannot be read, or the first row breaks a rule.
        """
        next(self.continuations(self.match_column()), None)

    def match_column(self) -> str:
        """Return the column of the EXAMPLES schema to match rows by: `example_id` if the file has it, or `prompt`.

        Raises:
            InputError: the file has no rows or cannot be read.
        """
        for _, row in self._rows():
            return "example_id" if "example_id" in row else "prompt"
        raise self.error("has no rows; give a file with rows")

    def continuations(self, key: str) -> Iterator[tuple[str, str]]:
        """Yield the key (a value of `match_column`) and the text of each continuation, in the order of the file.

        Raises:
            InputError: a column is missing, a value is not text, or the file cannot be read.
        """
        for place, row in self._rows():
            (owner,) = self._texts(place, row, key)
            if key == "prompt" and self.columns.context is not None:
                context = self._value(place, row, "context")
                owner = templates.with_context(owner, "" if context is None else self._texts(place, row, "context")[0])
            for text in self._texts(place, row, "text"):
                yield owner, text

    def _texts(self, place: str, row: Mapping[str, Any], field: str) -> list[str]:
        """Return the texts in a column: one, or for `text` perhaps a list; each may be a message."""
        value = self._value(place, row, field)
        if _is_conversation(value) and field in _ROLES:
            if len(value) > 1 or value[0].get("role") != _ROLES[field]:
                roles = ", ".join(str(message.get("role")) for message in value)
                raise self.error(
                    f"{place}: {self._column(field)!r} is a conversation of {shown(roles)}: must be one message of "
                    f"the {_ROLES[field]}; remove the others"
                )
            value = value[0].get("content")
        texts = value if field == "text" and isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, Unreadable):
                raise self.error(f"{place}: {self._column(field)!r} is {text.reason}")
            if not _is_text(text):
                raise self.error(f"{place}: {self._column(field)!r} is {shown(text)}: must be text")
        return texts

    def _value(self, place: str, row: Mapping[str, Any], field: str) -> Any:
        column = self._column(field)
        if column not in row:
            hint = nearest(column, row) or f"there are {listed(row)}"
            raise self.error(f"{place}: no column {column!r} ({self.key}.columns.{field}); {hint}")
        return row[column]

    def _column(self, field: str) -> str:
        return str(getattr(self.columns, field, field))  # the name of `example_id` is fixed

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the place of each row, for messages, and its values."""
        kinds = {".jsonl": self._jsonl, ".parquet": self._parquet, ".json": self._json}
        if not self.path.is_dir() and self.path.suffix.lower() == ".jsonl" and (content := other_content(self.path)):
            raise self.error(f"contains {content}; save it as text in UTF-8")
        read = self._parquets if self.path.is_dir() else kinds[self.path.suffix.lower()]
        try:
            for place, row in read():
                if not isinstance(row, dict):
                    raise self.error(f"{place} is {shown(row)}: must be an object")
                yield place, row
        except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
            raise self.error(f"cannot be read ({cause(error)})") from error

    def _jsonl(self) -> Iterator[tuple[str, Any]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise self.error(f"line {number} is not JSON ({cause(error)})") from error
                    yield f"line {number}", row

    def _parquets(self) -> Iterator[tuple[str, Any]]:
        for file in self._folder():
            yield from ((f"{file.relative_to(self.path)}, {place}", row) for place, row in self._parquet(file))

    def _parquet(self, path: Path | None = None) -> Iterator[tuple[str, Any]]:
        with pq.ParquetFile(path or self.path) as file:
            wanted = ("example_id", self.columns.prompt, self.columns.context, self.columns.text)
            there = [name for name in file.schema_arrow.names if name in wanted]
            if twice := duplicate(there):
                raise self.error(f"has two columns named {twice!r}; rename or remove one")
            # If a column is missing, all are read, so that the message can list them.
            batches = file.iter_batches(READ_AT_ONCE, columns=there if len(there) > 1 else None)
            rows = chain.from_iterable(map(batch_rows, batches))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))

    def _json(self) -> Iterator[tuple[str, Any]]:
        content = json.loads(self.path.read_bytes())
        if not isinstance(content, list):
            raise self.error("must be a list of objects; rename a file with one object per line to .jsonl")
        yield from ((f"row {number}", row) for number, row in enumerate(content, 1))


class Continuations:
    """The first continuations that a file has for each of some keys.

    The texts are in a scratch file, since a million prompts with eleven continuations each take gigabytes. Only hashes
    of the keys and the texts' offsets are in memory.
    """

    def __init__(
        self, keys: Iterable[str], limit: int, found: Iterable[tuple[str, str]], is_control: Callable[[str], bool]
    ):
        """Keep the first `limit` texts of each of the `keys`; `found` yields pairs of a key and a text."""
        self._number = {key: number for number, key in enumerate(dict.fromkeys(map(_short, keys)))}
        self._scratch = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this lives
        weakref.finalize(self, self._scratch.close)
        self._end = array("q", [0])
        owners, counts = array("i"), array("i", bytes(4 * len(self._number)))
        self.control_tokens = 0
        """Number of kept texts that contain control tokens."""
        for key, text in found:
            number = self._number.get(_short(key))
            if number is not None and counts[number] < limit:
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


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages, as chat templates take them."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _is_text(value: object) -> bool:
    """Return whether a value is a string that can be encoded; JSON can contain lone surrogates."""
    return isinstance(value, str) and is_encodable(value)


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # reprlib reads no more than it shows
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(key: str) -> bytes:
    """Return a hash that replaces a key in memory."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
