"""Sources of ground truth: JSONL, CSV, Parquet and text files, Hugging Face data sets, this Python's docs.

All give a stream of rows, each labelled `file:line` (Parquet and data sets: `name:row`, from 1). A line that cannot be
read is a refusal in that stream; a source that cannot be read at all, or lacks a mapped column, is an error.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec, check_unchanged, digest, sha256_once
from cpo_pipe.data.recipe import listed

TEXT_COLUMN = "text"
"""The one column of a source of plain articles."""
PYTHON_DOCS = "python-docs"

_FILES = (".jsonl", ".csv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TITLE = re.compile(rb" = [^=\s](.*[^=\s])? = \r?\n?")


@dataclass(frozen=True)
class Row:
    """A row as the source has it."""

    source: str
    """Where it stands: `file:line`."""
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

_CONTENTS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What files begin with that are not text in UTF-8."""


@dataclass(frozen=True)
class Source:
    """Something to read rows from; made by `locate_source`."""

    name: str
    """As the recipe calls it: a path, a hub name, or `python-docs`."""
    kind: str
    """A file's suffix, `folder`, `hub` or `python-docs`."""
    subset: str | None = None
    split: str = "train"
    commit: str | None = None
    """Of a hub data set."""

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """What decides its rows: the content of its files or the commit, never its name."""
        if self.kind == PYTHON_DOCS:
            from cpo_pipe.data import pydocs

            return {"kind": self.kind, "docs": pydocs.identity()}
        if self.kind == "hub":
            return {"kind": self.kind, "commit": self.commit, "subset": self.subset, "split": self.split}
        if self.kind != "folder":
            return {"kind": self.kind, "sha256": hash_file(Path(self.name))}
        return {"kind": self.kind, "files": self._hashes(hash_file), "subset": self.subset, "split": self.split}

    def check(self, identity: Spec) -> None:
        """Verify the files before reading rows: they must match `identity`.

        Raises:
            RunError: a file is damaged.
        """
        path = Path(self.name)
        if "sha256" in identity:
            check_unchanged(path, identity["sha256"])
        for name, recorded in identity.get("files", {}).items():
            check_unchanged(path / name, recorded)

    def _hashes(self, hash_file: Callable[[Path], str]) -> dict[str, str]:
        """SHA-256 of each file of a folder."""
        path = Path(self.name)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        return {str(file.relative_to(path)): hash_file(file) for file in files}

    def read(self, required: Mapping[str, str], optional: Iterable[str] = (), limit: int | None = None) -> Stream:
        """Its first `limit` rows (default: all).

        Args:
            required: columns that must be there, by the key of `data.columns` that names them.
            optional: further columns to read where they are there.
            limit: rows to read at most.

        Raises:
            InputError: a required column is not there (JSONL: in none of the rows), or there are no rows.
        """
        columns: dict[str, None] = {}
        readable = refused = 0
        for row in islice(self._rows(required, optional), limit):
            if isinstance(row, Row):
                readable += 1
                columns.update(dict.fromkeys(row.values))
            else:
                refused += 1
            yield row
        if not readable + refused:
            raise InputError(f"data.source {self.name}: there are no rows in it; name a source that has some")
        if readable:
            _require(self.name, required, list(columns))

    def count(self) -> int:
        """Rows in it."""
        if self.kind == ".jsonl":
            with Path(self.name).open("rb") as file:
                return sum(1 for line in file if not line.isspace())
        if self.kind == ".parquet":
            return int(_parquet(self.name).metadata.num_rows)
        if self.kind in ("folder", "hub"):
            return int(self._data_set.num_rows)
        return sum(1 for _ in self._rows({}, ()))

    def _rows(self, required: Mapping[str, str], optional: Iterable[str]) -> Stream:
        wanted = [*required.values(), *optional]
        if self.kind in (".jsonl", ".csv", ".txt") and (content := other_content(Path(self.name))):
            raise InputError(f"data.source {self.name}: contains {content}; save it as text in UTF-8")
        if self.kind == ".jsonl":
            return _jsonl(Path(self.name))
        if self.kind == ".csv":
            return _csv(Path(self.name), required, wanted)
        if self.kind == ".parquet":
            parquet = _parquet(self.name)
            schema = parquet.schema_arrow
            _require(self.name, required, schema.names)
            there = [name for name in schema.names if name in wanted]
            if twice := duplicate(there):
                raise InputError(f"data.source {self.name}: has two columns named {twice!r}; rename or remove one")
            batches = parquet.iter_batches(batch_size=1024, columns=there)
            return self._numbered(Path(self.name).name, batches, _class_names(schema))
        if self.kind in ("folder", "hub"):
            data_set = self._data_set
            _require(self.name, required, data_set.column_names)
            there = [name for name in data_set.column_names if name in wanted]
            batches = data_set.select_columns(there).with_format("arrow").iter(batch_size=1024)
            return self._numbered(f"{self.name}/{self.split}", batches, _class_names(data_set.features.arrow_schema))
        _require(self.name, required, [TEXT_COLUMN])
        return _articles(Path(self.name)) if self.kind == ".txt" else _python_docs()

    def _numbered(self, name: str, batches: Iterable[Any], classes: Mapping[str, Sequence[str]]) -> Stream:
        """Yield the rows of Arrow record batches or tables; `classes` are the names that numbers in a column stand for.

        Raises:
            InputError: a part of the file is damaged.
        """
        number = 0
        try:
            for batch in batches:
                columns = {column: values(batch.column(column)) for column in batch.schema.names}
                for column in classes.keys() & columns.keys():
                    columns[column] = [_class_name(value, classes[column]) for value in columns[column]]
                for index in range(batch.num_rows):
                    number += 1
                    row = {column: found[index] for column, found in columns.items()}
                    bad = next((column for column, value in row.items() if isinstance(value, Unreadable)), None)
                    label = f"{name}:{number}"
                    yield Row(label, row) if bad is None else Refusal(label, row[bad].reason, f"column {bad}")
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"data.source {self.name}: damaged after row {number:,} ({cause(error)}); write the file again"
            ) from error

    @cached_property
    def _data_set(self) -> Any:
        import datasets

        cache = None  # of a hub data set the library's own, which goes by the commit
        if self.kind == "folder":  # there it goes by path and modification time, which a replaced file may keep
            cache = Path(datasets.config.HF_DATASETS_CACHE) / "cpo-pipe" / digest(self._hashes(sha256_once))
        try:
            return datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.commit, cache_dir=cache
            )
        except Exception as error:  # the library's failures have no common type: no such subset, split, unreadable, …
            raise InputError(f"data.source {self.name}: not readable as a data set ({cause(error)})") from error


def locate_source(name: str, subset: str | None = None, split: str = "train", revision: str | None = None) -> Source:
    """The source that a path or a hub name leads to; a hub data set is pinned to its commit.

    Raises:
        InputError: there is no such file, folder or data set, or the file has a format that is not read.
    """
    path = Path(name)
    if path.is_dir():
        _refuse_saved(path, split)
        return Source(name, "folder", subset, split)
    if path.suffix.lower() in _FILES:
        if not path.is_file():
            raise InputError(f"data.source {name}: no such file; give the path of a {', '.join(_FILES)} file")
        return Source(name, path.suffix.lower())
    if path.is_file():
        raise InputError(f"data.source {name}: the suffix {path.suffix!r} is none of {', '.join(_FILES)}; convert it")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"data.source {name}: no such file or folder, and not the name of a Hugging Face data set")
    return Source(name, "hub", subset, split, _hub_commit(name, revision))


def _refuse_saved(folder: Path, split: str) -> None:
    """Refuse a folder that `save_to_disk` of the `datasets` library wrote: its files are no Parquet.

    Raises:
        InputError: it is one.
    """
    splits = (folder / "dataset_dict.json").is_file()
    if splits or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        one = f"[{split!r}]" if splits else ""
        raise InputError(
            f"data.source {folder}: is a folder that save_to_disk wrote, which is not read; write a Parquet file with "
            f"datasets.load_from_disk({str(folder)!r}){one}.to_parquet('{folder.name}.parquet') and name that file"
        )


def duplicate(names: Sequence[str]) -> str | None:
    """Return the first name that is in a list more than once, or None."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes in columns of type ClassLabel, by column, as `datasets` records them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: feature for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {name: list(map(str, feature["names"])) for name, feature in kinds.items()}
    except (KeyError, ValueError, TypeError, AttributeError):  # of another version, or none
        return {}


def _hub_commit(name: str, revision: str | None) -> str:
    """The commit of a hub data set; without a network, the one that the hub's cache recorded."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        folder = f"datasets--{name.replace('/', '--')}"
        cached = Path(constants.HF_HUB_CACHE) / folder / "refs" / (revision or "main")
        if cached.is_file():
            return cached.read_text().strip()
        raise InputError(
            f"data.source {name}: no such file or folder, and the hub gave no such data set ({cause(error)})"
        ) from error


def _require(source: str, required: Mapping[str, str], there: Sequence[str]) -> None:
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


def _jsonl(path: Path) -> Stream:
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


def _csv(path: Path, required: Mapping[str, str], wanted: Sequence[str]) -> Stream:
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
        _require(str(path), required, header)
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


def _parquet(name: str) -> Any:
    try:
        file = pq.ParquetFile(name)
        file.schema_arrow.names  # noqa: B018 - an error where a name is not UTF-8
        return file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"data.source {name}: not a Parquet file ({cause(error)})") from error


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a value that Python cannot hold."""

    reason: str


def values(column: Any) -> list[Any]:
    """Return the values of an Arrow column; text that is not UTF-8 has surrogates for the bytes, as in CSV."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # such as bytes that are not UTF-8, or the year 10,000
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            raw = column.cast(pa.large_binary()).to_pylist()
            return [value if value is None else value.decode(errors="surrogateescape") for value in raw]
        return list(map(_value, column))


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, OverflowError, pa.ArrowException):
        return Unreadable("not text")


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


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class; None of -1, which stands for no class."""
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _articles(path: Path) -> Stream:
    """Articles of a text file: in WikiText's style, or else the whole file as one.

    WikiText begins an article with a line ` = Title = ` between blank lines (` = = Section = = ` is not a title).
    """
    article: list[bytes] = []
    start, after_blank = 1, True
    with path.open("rb") as file:
        for number, (line, following) in enumerate(pairwise(chain(file, [b""])), 1):
            if after_blank and _TITLE.fullmatch(line) and not following.strip():
                yield from _article(f"{path.name}:{start}", article)
                article, start = [], number
            article.append(line)
            after_blank = not line.strip()
    yield from _article(f"{path.name}:{start}", article)


def _article(label: str, lines: Sequence[bytes]) -> Stream:
    content = b"".join(lines).strip()
    if not content:
        return
    try:
        yield Row(label, {TEXT_COLUMN: content.decode("utf-8-sig")})
    except UnicodeDecodeError:
        yield Refusal(label, "not UTF-8", content[:1000].decode(errors="backslashreplace"))


def _python_docs() -> Stream:
    from cpo_pipe.data import pydocs

    for number, article in enumerate(pydocs.collect(), 1):
        yield Row(f"{PYTHON_DOCS}:{number}", {TEXT_COLUMN: article})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
