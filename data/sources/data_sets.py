"""Data sets of the `datasets` library: on the Hugging Face hub, or in a folder that `save_to_disk` wrote."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.sources.arrow import READ_AT_ONCE, class_names, read_batches
from cpo_pipe.data.sources.files import Folder
from cpo_pipe.data.sources.rows import ColumnRequest, Stream
from cpo_pipe.data.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class HubDataSet(Source):
    """A split of a data set on the hub, at a commit."""

    commit: str
    subset: str | None = None
    split: str = "train"

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the commit, subset and split."""
        return {"kind": "hub", "commit": self.commit, "subset": self.subset, "split": self.split}

    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield the rows. With a limit, no more than the rows read is downloaded, unless the hub is offline."""
        data_set = self._streamed if _streams(limit) else self._whole
        return _rows(data_set, f"{self.name}/{self.split}", request, limit)

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows; of rows that are streamed the limit, where the data set does not know them."""
        if limit is None or not _streams(limit):
            return int(self._whole.num_rows)
        known = (self._streamed.info.splits or {}).get(self.split)
        return limit if known is None or not known.num_examples else min(limit, int(known.num_examples))

    @cached_property
    def _whole(self) -> Any:
        return self._load(streaming=False)

    @cached_property
    def _streamed(self) -> Any:
        return self._load(streaming=True)

    def _load(self, streaming: bool) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.commit, streaming=streaming
            )
        except Exception as error:  # the library's failures have no common type: no such subset, split, unreadable, …
            raise self.request({}).error(f"not readable as a data set ({cause(error)})") from error


@dataclass(frozen=True, kw_only=True)
class SavedDataSet(Folder):
    """A data set that `save_to_disk` wrote, or a split of several that it wrote."""

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the content of the files and the split."""
        return {**super().identity(hash_file), "kind": "saved"}

    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield the rows."""
        return _rows(self._data_set, self.path.name, request, None)

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows."""
        return int(self._data_set.num_rows)

    @cached_property
    def _data_set(self) -> Any:
        import datasets

        try:
            found = datasets.load_from_disk(str(self.path))
        except Exception as error:  # the library's failures have no common type
            raise self.request({}).error(f"not readable as a data set ({cause(error)})") from error
        if not isinstance(found, datasets.DatasetDict):
            return found
        if self.split not in found:
            raise self.request({}).error(f"has no split {self.split!r}; choose from {', '.join(found)}")
        return found[self.split]


def saved_splits(folder: Path) -> bool | None:
    """Return whether a folder that `save_to_disk` wrote has splits; None if it did not write it."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return False if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def _streams(limit: int | None) -> bool:
    from huggingface_hub import constants

    return limit is not None and not constants.HF_HUB_OFFLINE


def _rows(data_set: Any, label: str, request: ColumnRequest, limit: int | None) -> Stream:
    """Yield the rows of a data set, which may be streamed."""
    names = data_set.column_names  # unknown of some data sets that are streamed
    if names is not None:
        data_set = data_set.select_columns(request.select(names))
    size = READ_AT_ONCE if limit is None else min(limit, READ_AT_ONCE)
    batches = _reported(iter(data_set.with_format("arrow").iter(batch_size=size)), request)
    first = next(batches, None)
    if first is None:
        return
    schema = first.schema if data_set.features is None else data_set.features.arrow_schema
    if names is None:
        columns = request.select(first.schema.names)
        batches = (batch.select(columns) for batch in chain([first], batches))
    else:
        batches = chain([first], batches)
    yield from read_batches(label, batches, class_names(schema), request)


def _reported(batches: Iterator[Any], request: ColumnRequest) -> Iterator[Any]:
    """Turn the failures of a data set that is streamed into an InputError of one line."""
    try:
        yield from batches
    except InputError:
        raise
    except Exception as error:  # of the network, or of files that are read only now
        raise request.error(f"cannot be read ({cause(error)})") from error
