"""Work for executors."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.store import Rows, Store

WORKERS = 2


@dataclass(frozen=True)
class Measured(Work):
    """Notes each example's number twice: in `first` before `second`."""

    first: Rows
    second: Rows
    trouble: str = ""
    meeting: str = ""
    """A folder in which the workers wait for each other, however long one takes to start."""

    @property
    def outputs(self) -> list[Rows]:
        return [self.first, self.second]

    def open(self) -> Make:
        return self.make

    def make(self, batch: pa.Table) -> Iterator[NewRows]:
        if self.meeting:
            (Path(self.meeting) / str(os.getpid())).touch()
            end = time.monotonic() + 120
            while len(list(Path(self.meeting).iterdir())) < WORKERS and time.monotonic() < end:
                time.sleep(0.05)
        for row in batch.to_pylist():
            if row["number"] == 7 and self.trouble == "input":
                raise InputError("field is 7: must be less; lower it")
            if row["number"] == 7 and self.trouble == "run":
                raise RunError("number 7 is not finite")
            if row["number"] == 7 and self.trouble == "crash":
                raise ZeroDivisionError("seven")
            if row["number"] == 7 and self.trouble.startswith("/") and not Path(self.trouble).exists():
                Path(self.trouble).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            value = {"example_id": f"e{row['number']}", "candidate_id": "c", "logprob": float(row["number"]),
                     "num_tokens": os.getpid()}  # fmt: skip
            yield NewRows([[value], [value]], 1)


def batches(count: int, size: int) -> Iterator[pa.Table]:
    for start in range(0, count, size):
        yield pa.table({"number": list(range(start, min(start + size, count)))})


def work(root: Path | str, trouble: str = "") -> Measured:
    store = Store(root)
    return Measured(*(store.rows("reference-logprobs", {"output": name}) for name in ("first", "second")), trouble)


def numbers(rows: Rows) -> list[float]:
    values: list[Any] = rows.read([f"e{number}" for number in range(20)])["logprob"].to_pylist()
    return values
