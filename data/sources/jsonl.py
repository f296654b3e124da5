"""Rows of JSON lines."""

import json
from pathlib import Path

from cpo_pipe.data.sources.rows import Refusal, Row, Stream


def read_jsonl(path: Path) -> Stream:
    """Yield the rows of a file of JSON objects, one a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _json_row(f"{path.name}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json_row(label: str, line: bytes) -> Row | Refusal:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Refusal(label, "not UTF-8", line.decode(errors="backslashreplace"))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return Refusal(label, "not JSON", text)
    return Row(label, values) if isinstance(values, dict) else Refusal(label, "not an object", text)
