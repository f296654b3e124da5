"""Files of rows: JSON, CSV, TSV, Parquet and text, compressed or not; one, several, or those of a folder."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from cpo_pipe.data.errors import cause
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.sources.arrow import class_name, open_parquet, read_parquet
from cpo_pipe.data.sources.articles import read_articles
from cpo_pipe.data.sources.csv_rows import read_csv, read_tsv
from cpo_pipe.data.sources.json_rows import read_json, read_jsonl
from cpo_pipe.data.sources.rows import ColumnRequest, Row, Stream
from cpo_pipe.data.sources.source import Source

_TEXTS: dict[str, Callable[[BufferedReader, str, ColumnRequest], Stream]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_articles,
}
"""Formats that are text, and may be compressed."""
_PARQUET = ".parquet"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = f"{', '.join([*_TEXTS, _PARQUET])} (text formats also as {' or '.join(_COMPRESSIONS)})"
"""What messages say about formats."""
_CONTENTS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Leading bytes of files that are not text in UTF-8."""
_RENAME = {"gzip": ".gz", "zstd": ".zst"}


def format_of(name: str | PurePath) -> str | None:
    """Return the format of a file, such as `.jsonl.gz`; None if it is not supported."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in PurePath(name).suffixes)]
    if last == _PARQUET or last in _TEXTS:
        return last
    return before + last if last in _COMPRESSIONS and before in _TEXTS else None


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """One file or several, read one after the other, each by its format."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    """The files by their labels in the places of rows."""

    def files(self) -> Mapping[str, Path]:
        """Return the files."""
        return self.paths

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the content of the files; of one file not its name."""
        if len(self.paths) == 1:
            (path,) = self.paths.values()
            return {"kind": format_of(path), "sha256": hash_file(path)}
        return {"kind": "files", "files": {label: hash_file(path) for label, path in self.paths.items()}}

    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield the rows of all files."""
        for label, path in self.paths.items():
            yield from _read(path, label, request if len(self.paths) == 1 else request.within(label))

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows."""
        return sum(_count(path, label, self.request({}), limit) for label, path in self.paths.items())


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A folder of files. The `datasets` library decides which of them are a split: by a README or by their names."""

    path: Path
    subset: str | None = None
    split: str = "train"

    def files(self) -> Mapping[str, Path]:
        """Return all files that are not hidden: also a README decides what is read."""
        found = {path.relative_to(self.path): path for path in sorted(self.path.rglob("*")) if path.is_file()}
        return {str(name): path for name, path in found.items() if not any(part[0] == "." for part in name.parts)}

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the content of the files, subset and split."""
        files = {label: hash_file(path) for label, path in self.files().items()}
        return {"kind": "folder", "files": files, "subset": self.subset, "split": self.split}

    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield the rows of the split's files, with names of classes that a README gives."""
        chosen, classes = self._split
        for label, path in chosen.items():
            for row in _read(path, label, request.within(label)):
                if isinstance(row, Row) and classes.keys() & row.values.keys():
                    named = {
                        name: class_name(row.values[name], classes[name]) for name in classes if name in row.values
                    }
                    row = Row(row.source, {**row.values, **named})
                yield row

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows."""
        return sum(_count(path, label, self.request({}), limit) for label, path in self._split[0].items())

    @cached_property
    def _split(self) -> tuple[Mapping[str, Path], Mapping[str, list[str]]]:
        """Return the split's files, and the names of classes by column."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(str(self.path), self.subset)
            found: Mapping[Any, list[str]] = builder.config.data_files or {}
        except Exception as error:  # the library's failures have no common type: no data files, no such subset, …
            raise self.request({}).error(f"not readable as a data set ({cause(error)})") from error
        splits = {str(split): [Path(path) for path in paths] for split, paths in found.items()}
        if self.split not in splits:
            raise self.request({}).error(f"has no split {self.split!r}; choose from {', '.join(splits)}")
        unknown = [path for path in splits[self.split] if format_of(path) is None]
        if unknown:
            raise self.request({}).error(f"the format of {unknown[0].name} is not supported; convert it to {SUPPORTED}")
        features = builder.info.features or {}
        classes = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        root = self.path.resolve()
        return {str(path.resolve().relative_to(root)): path for path in splits[self.split]}, classes


def _read(path: Path, label: str, request: ColumnRequest) -> Stream:
    """Yield the rows of a file.

    Raises:
        InputError: it is damaged, or its content is not of its format.
    """
    kind = format_of(path)
    assert kind is not None  # checked when the source was located
    if kind == _PARQUET:
        yield from read_parquet(path, label, request)
        return
    number = 0
    try:
        with _opened(path) as stream:
            start = stream.peek(4)
            if content := next((content for magic, content in _CONTENTS.items() if start.startswith(magic)), None):
                suffix = _RENAME.get(content)
                fix = f"name it {path.name}{suffix}" if suffix else "save it as text in UTF-8"
                raise request.error(f"contains {content}; {fix}")
            for number, row in enumerate(_TEXTS["." + kind.split(".")[1]](stream, label, request), 1):  # noqa: B007
                yield row
    except OSError as error:
        raise request.error(f"damaged after row {number:,} ({cause(error)}); write the file again") from error


def _count(path: Path, label: str, request: ColumnRequest, limit: int | None) -> int:
    """Return the number of rows in a file."""
    kind = format_of(path) or ""
    if kind == _PARQUET:
        return int(open_parquet(path, request).metadata.num_rows)
    if kind.startswith(".jsonl"):
        try:
            with _opened(path) as stream:
                return sum(1 for line in stream if not line.isspace())
        except OSError:  # `_read` says what is wrong
            pass
    return sum(1 for _ in islice(_read(path, label, request), limit))


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file of text, decompressed."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as file:
            yield file
    else:
        with pa.input_stream(str(path), compression=compression) as raw, io.BufferedReader(raw, 1 << 20) as stream:
            yield stream
