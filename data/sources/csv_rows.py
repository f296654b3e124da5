"""Rows of CSV, and of TSV."""

import csv
import io
import sys
from io import BufferedReader

from cpo_pipe.data.sources.rows import ColumnRequest, Refusal, Row, Stream


def read_csv(stream: BufferedReader, label: str, request: ColumnRequest, delimiter: str = ",") -> Stream:
    """Yield the rows of a CSV file with a header. All values are text.

    Raises:
        InputError: the header is damaged or lacks a column, or a quote is not closed.
    """
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than some articles
    # Bytes that are not UTF-8 stay in the values as surrogates, for the reader of the row to refuse.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise request.error(f"the header is not CSV ({error}); correct line 1") from error
    if header is None:
        return
    request.select(header)
    while True:
        place = f"{label}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):  # everything after the quote would be lost
                raise request.error(f"the quote opened at {place} is not closed") from error
            yield Refusal(place, "not CSV", str(error))
            continue
        if fields is None:
            return
        if len(fields) > len(header):
            yield Refusal(place, "more fields than columns", delimiter.join(fields))
        elif fields:
            yield Row(place, dict(zip(header, fields, strict=False)))


def read_tsv(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a file with tabs between its fields; see `read_csv`."""
    return read_csv(stream, label, request, "\t")
