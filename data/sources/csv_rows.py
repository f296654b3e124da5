"""Rows of CSV."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.sources.rows import Refusal, Row, Stream, duplicate, require


def read_csv(path: Path, required: Mapping[str, str], wanted: Sequence[str]) -> Stream:
    """Yield the rows of a CSV file with a header.

    Args:
        path: the file.
        required: columns that must be there, by the key of `data.columns` that names them.
        wanted: columns that must not be there twice.
    """
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than some articles
    # Bytes that are not UTF-8 stay in the values as surrogates, for the reader of the row to refuse.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise InputError(f"data.source {path}: the header is not CSV ({error}); correct line 1") from error
        if header is None:
            return
        require(str(path), required, header)
        if twice := duplicate([name for name in header if name in wanted]):
            raise InputError(f"data.source {path}: has two columns named {twice!r}; rename or remove one")
        while True:
            label = f"{path.name}:{reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # everything after the quote would be lost
                    raise InputError(f"data.source {path}: the quote opened at {label} is not closed") from error
                yield Refusal(label, "not CSV", str(error))
                continue
            if fields is None:
                return
            if len(fields) > len(header):
                yield Refusal(label, "more fields than columns", ",".join(fields))
            elif fields:
                yield Row(label, dict(zip(header, fields, strict=False)))
