"""The base class of sources: something that rows are read from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cpo_pipe.data.fingerprint import Spec, check_unchanged
from cpo_pipe.data.sources.rows import ColumnRequest, Row, Stream


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Something to read rows from; made by `locate_source`."""

    name: str
    """As the recipe calls it: a path, a URL or a hub name."""
    key: str = "data.source"
    """The key of the recipe that names it, for messages."""
    columns_key: str | None = "data.columns"
    """The key of its column mapping; None: the columns' names are fixed."""

    @abstractmethod
    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the fields that determine its rows: the content of its files or the commit, never its name."""

    @abstractmethod
    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield the rows in order, with the requested columns; after `limit` rows the caller stops.

        Raises:
            InputError: a required column is missing, or the source cannot be read.
        """

    def files(self) -> Mapping[str, Path]:
        """Return the local files that the rows are read from, by the label that the rows' places have."""
        return {}

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows, or more, where `limit` rows are read at most."""
        return sum(1 for _ in islice(self.rows(self.request({}), limit), limit))

    def check(self, identity: Spec) -> None:
        """Verify the files before reading rows: they must match `identity`.

        Raises:
            RunError: a file is damaged.
        """
        recorded = identity.get("files", {})
        for label, path in self.files().items():
            check_unchanged(path, identity.get("sha256") or recorded.get(label, ""))

    def request(self, required: Mapping[str, str], optional: Collection[str] | None = ()) -> ColumnRequest:
        """Return a request of columns; see `read`."""
        return ColumnRequest(f"{self.key} {self.name}", required, optional, self.columns_key)

    def read(
        self, required: Mapping[str, str], optional: Collection[str] | None = (), limit: int | None = None
    ) -> Stream:
        """Yield the first `limit` rows (default: all), each labelled `file:line` (Parquet, data sets: `name:row`).

        A row that cannot be read is a refusal in the stream.

        Args:
            required: columns that must be there, by the key of the column mapping that names them.
            optional: further columns to read if they exist; None: all.
            limit: rows to read at most.

        Raises:
            InputError: a required column is missing (JSON: from every row), or there are no rows.
        """
        request = self.request(required, optional)
        columns: dict[str, None] = {}
        readable = refused = 0
        for row in islice(self.rows(request, limit), limit):
            if isinstance(row, Row):
                readable += 1
                columns.update(dict.fromkeys(row.values))
            else:
                refused += 1
            yield row
        if not readable + refused:
            raise request.error("has no rows; name a source that has some")
        if readable:
            request.require(list(columns))
