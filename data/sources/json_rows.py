"""Rows of JSON: one object a line, or one list of objects."""

import json
from io import BufferedReader
from itertools import islice

from cpo_pipe.data.errors import cause
from cpo_pipe.data.sources.rows import ColumnRequest, Refusal, Row, Stream

_BOM = b"\xef\xbb\xbf"


def read_jsonl(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a file of JSON objects, one a line."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield _parsed(f"{label}:{number}", line)


def read_json(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a list of objects. A file that does not begin with `[` is read as JSON lines.

    The whole list is in memory.

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
        found = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise request.error(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise request.error(f"is not JSON ({cause(error)}); correct the file") from error
    for number, value in enumerate(found, 1):
        place = f"{label}:{number}"
        yield Row(place, value) if isinstance(value, dict) else Refusal(place, "not an object", json.dumps(value))


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
