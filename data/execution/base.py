"""Where a stage's work is done: in this process, or by Ray's workers on one machine or a cluster.

A stage says what makes its rows (`Work`) and from what (batches of items); an executor opens the work wherever it runs
and writes the rows through the store. How the items are batched, and who makes which, changes no row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from cpo_pipe.data.execution import processes
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows, ShardWriter


@dataclass(frozen=True)
class NewRows:
    """Rows made of some items of a batch."""

    rows: Sequence[Sequence[Mapping[str, Any]]]
    """The rows for each output of the work."""
    units: int
    """Progress, in the unit that the stage counts."""


Make = Callable[[pa.Table], Iterable[NewRows]]
"""From a batch of items to their rows, as they are ready."""


class Work(ABC):
    """Makes rows. It can be pickled; `open` loads what is heavy, once in each process that works."""

    flush_each: ClassVar[bool] = False
    """Whether rows are written to the store as soon as they are made, such as answers that cost money."""
    unit: ClassVar[str] = "samples"
    """What is counted, for progress bars."""

    rows: Rows

    @property
    def outputs(self) -> Sequence[Rows]:
        """Return where the rows go. Rows of an earlier output are recorded before those of a later one.

        By default these are `rows`, and before them `refused`, where the work has this field.
        """
        refused: Rows | None = getattr(self, "refused", None)
        return [self.rows] if refused is None else [refused, self.rows]

    @abstractmethod
    def open(self) -> Make:
        """Load what is needed and return the function that makes rows."""


class Executor(Protocol):
    """Does a stage's work; the caller holds the locks of the outputs."""

    def run(self, work: Work, batches: Iterable[pa.Table], label: str, total: int) -> None:
        """Make the rows of all batches, under a progress bar called `label` with `total` units.

        What is made is kept, however this ends.
        """
        ...


class LocalExecutor:
    """Does the work in this process."""

    def run(self, work: Work, batches: Iterable[pa.Table], label: str, total: int) -> None:
        """Make the rows of all batches."""
        make = work.open()
        with _writers(work) as writers, track(label, total, work.unit, shown=processes.is_main()) as meter:
            for batch in batches:
                for units in _do(work, make, batch, writers):
                    meter.advance(units)


def do_batch(work: Work, make: Make, batch: pa.Table) -> Iterator[int]:
    """Make and record the rows of one batch; yields the units done. All is recorded when it ends."""
    with _writers(work) as writers:
        yield from _do(work, make, batch, writers)


@contextmanager
def _writers(work: Work) -> Iterator[list[ShardWriter]]:
    with ExitStack() as stack:
        writers: list[ShardWriter] = []
        for rows in work.outputs:
            writers.append(stack.enter_context(rows.writer(after=writers[-1] if writers else None)))
        yield writers


def _do(work: Work, make: Make, batch: pa.Table, writers: Sequence[ShardWriter]) -> Iterator[int]:
    for new in make(batch):
        for writer, rows in zip(writers, new.rows, strict=True):
            writer.add(rows)
        if work.flush_each:
            writers[-1].flush()
        yield new.units
