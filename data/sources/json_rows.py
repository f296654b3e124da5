"""Rows of JSON: one object a line, or one list of objects."""

import json
import re
from collections.abc import Iterator
from io import BufferedReader
from itertools import islice
from typing import Any

from cpo_pipe.data.errors import cause
from cpo_pipe.data.sources.rows import ColumnRequest, Refusal, Row, Stream

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


def read_jsonl(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a file of JSON objects, one a line."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield _parsed(f"{label}:{number}", line)


def read_json(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a list of objects. A file that does not begin with `[` is read as JSON lines.

    The text of the file is in memory as a whole, its objects one after the other.

    Raises:
        InputError: the list is not JSON, or the file is one object over several lines.
    """
    start = stream.peek(1 << 16).removeprefix(_BOM).lstrip()
    if not start.startswith(b"["):
        rows = read_jsonl(stream, label, request)
        first = list(islice(rows, 2))
        if first and all(isinstance(row, Refusal) for row in first):
            raise request.error("must be a list of objects, or have one object per line")
        yield from first
        yield from rows
        return
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise request.error(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    for number, value in enumerate(_items(text, request), 1):
        place = f"{label}:{number}"
        yield Row(place, value) if isinstance(value, dict) else Refusal(place, "not an object", json.dumps(value))


def _items(text: str, request: ColumnRequest) -> Iterator[Any]:
    """Yield the items of a JSON list, one after the other."""
    decode, number = json.JSONDecoder().raw_decode, 0
    place = _skip(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        number += 1
        try:
            if number > 1:
                if text[place : place + 1] != ",":
                    raise ValueError("a comma is missing before it")
                place = _skip(text, place + 1)
            value, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            raise request.error(f"is not JSON in row {number:,} ({cause(error)}); correct the file") from error
        yield value
        place = _skip(text, place)
    if _skip(text, place + 1) < len(text):
        raise request.error("has text after its list; correct the file")


def _skip(text: str, place: int) -> int:
    """Return the place behind white space."""
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _parsed(label: str, line: bytes) -> Row | Refusal:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Refusal(label, "not UTF-8", line.decode(errors="backslashreplace"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Refusal(label, "not JSON", text)
    return Row(label, value) if isinstance(value, dict) else Refusal(label, "not an object", text)
