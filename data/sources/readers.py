"""Sources of ground truth: JSONL, CSV, Parquet and text files, Hugging Face data sets.

All give a stream of rows, each labelled `file:line` (Parquet and data sets: `name:row`, from 1). A line that cannot be
read is a refusal in that stream; a source that cannot be read at all, or lacks a mapped column, is an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec, check_unchanged, digest, sha256_once
from cpo_pipe.data.sources.arrow import READ_AT_ONCE, open_parquet, read_batches, read_parquet
from cpo_pipe.data.sources.articles import read_articles
from cpo_pipe.data.sources.csv_rows import read_csv
from cpo_pipe.data.sources.jsonl import read_jsonl
from cpo_pipe.data.sources.rows import TEXT_COLUMN, Row, Stream, other_content, require

_FILES = (".jsonl", ".csv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """Something to read rows from; made by `locate_source`."""

    name: str
    """As the recipe calls it: a path or a hub name."""
    kind: str
    """A file's suffix, `folder` or `hub`; a subclass has its own."""
    subset: str | None = None
    split: str = "train"
    commit: str | None = None
    """Of a hub data set."""

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the fields that determine its rows: the content of its files or the commit, never its name."""
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
        """Return the SHA-256 of each file of a folder."""
        path = Path(self.name)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        return {str(file.relative_to(path)): hash_file(file) for file in files}

    def read(self, required: Mapping[str, str], optional: Iterable[str] = (), limit: int | None = None) -> Stream:
        """Yield its first `limit` rows (default: all).

        Args:
            required: columns that must be there, by the key of `data.columns` that names them.
            optional: further columns to read if they exist.
            limit: rows to read at most.

        Raises:
            InputError: a required column is missing (JSONL: from every row), or the source has no rows.
        """
        columns: dict[str, None] = {}
        readable = refused = 0
        for row in islice(self.rows(required, optional), limit):
            if isinstance(row, Row):
                readable += 1
                columns.update(dict.fromkeys(row.values))
            else:
                refused += 1
            yield row
        if not readable + refused:
            raise InputError(f"data.source {self.name}: has no rows; name a source that has some")
        if readable:
            require(self.name, required, list(columns))

    def count(self) -> int:
        """Return the number of rows."""
        if self.kind == ".jsonl":
            with Path(self.name).open("rb") as file:
                return sum(1 for line in file if not line.isspace())
        if self.kind == ".parquet":
            return int(open_parquet(self.name).metadata.num_rows)
        if self.kind in ("folder", "hub"):
            return int(self._data_set.num_rows)
        return sum(1 for _ in self.rows({}, ()))

    def rows(self, required: Mapping[str, str], optional: Iterable[str]) -> Stream:
        """Yield all rows, with the required columns and the optional ones that exist."""
        wanted = [*required.values(), *optional]
        if self.kind in (".jsonl", ".csv", ".txt") and (content := other_content(Path(self.name))):
            raise InputError(f"data.source {self.name}: contains {content}; save it as text in UTF-8")
        if self.kind == ".jsonl":
            return read_jsonl(Path(self.name))
        if self.kind == ".csv":
            return read_csv(Path(self.name), required, wanted)
        if self.kind == ".parquet":
            return read_parquet(self.name, required, wanted)
        if self.kind in ("folder", "hub"):
            data_set = self._data_set
            require(self.name, required, data_set.column_names)
            there = [name for name in data_set.column_names if name in wanted]
            batches = data_set.select_columns(there).with_format("arrow").iter(batch_size=READ_AT_ONCE)
            return read_batches(self.name, f"{self.name}/{self.split}", batches, data_set.features.arrow_schema)
        require(self.name, required, [TEXT_COLUMN])
        return read_articles(Path(self.name))

    @cached_property
    def _data_set(self) -> Any:
        import datasets

        cache = None  # of a hub data set the library's own, which is keyed by the commit
        if (
            self.kind == "folder"
        ):  # its cache there is keyed by path and modification time, which a replaced file may keep
            cache = Path(datasets.config.HF_DATASETS_CACHE) / "cpo-pipe" / digest(self._hashes(sha256_once))
        try:
            return datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.commit, cache_dir=cache
            )
        except Exception as error:  # the library's failures have no common type: no such subset, split, unreadable, …
            raise InputError(f"data.source {self.name}: not readable as a data set ({cause(error)})") from error


def locate_source(name: str, subset: str | None = None, split: str = "train", revision: str | None = None) -> Source:
    """Return the source that a path or a hub name leads to; a hub data set is pinned to its commit.

    Raises:
        InputError: no such file, folder or data set, or the format is not supported.
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
        formats = ", ".join(_FILES)
        raise InputError(f"data.source {name}: suffix {path.suffix!r} is not supported; convert it to one of {formats}")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"data.source {name}: no such file or folder, and not the name of a Hugging Face data set")
    return Source(name, "hub", subset, split, _hub_commit(name, revision))


def _refuse_saved(folder: Path, split: str) -> None:
    """Refuse a folder that `save_to_disk` of the `datasets` library wrote: its files are not Parquet.

    Raises:
        InputError: the folder has the files that `save_to_disk` writes.
    """
    splits = (folder / "dataset_dict.json").is_file()
    if splits or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        one = f"[{split!r}]" if splits else ""
        raise InputError(
            f"data.source {folder}: is a folder that save_to_disk wrote, which is not read; write a Parquet file with "
            f"datasets.load_from_disk({str(folder)!r}){one}.to_parquet('{folder.name}.parquet') and name that file"
        )


def _hub_commit(name: str, revision: str | None) -> str:
    """Return the commit of a hub data set; without a network, the one that the hub's cache recorded."""
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


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
