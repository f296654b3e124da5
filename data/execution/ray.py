"""Work done by Ray's workers: on the cluster that RAY_ADDRESS names, or else on this machine.

The batches are Parquet files beside the output. Ray Data hands their names to actors that have opened the work, and
restarts actors that die. The actors write through the store themselves; a batch that is done twice is harmless there.
On a cluster all nodes must see the store under the same path or URL.
"""

import logging
import os
import signal
import socket
import traceback
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data.errors import LONGEST_REASON, InputError, RunError, cause
from cpo_pipe.data.execution.base import Work, do_batch
from cpo_pipe.data.progress import track
from cpo_pipe.data.store.paths import AnyPath
from cpo_pipe.data.text import one_line

log = logging.getLogger(__name__)

DEATHS = 3
"""Times that Ray restarts a dead worker, and retries its batch, before the run fails."""


class RayExecutor:
    """Does the work in Ray's workers."""

    def __init__(self, workers: int | None = None, worker_gpus: float | None = None):
        """`workers`: by default one per GPU, or per core without GPUs; `worker_gpus`: each, by default 1 if any."""
        self._workers, self._worker_gpus = workers, worker_gpus

    def run(self, work: Work, batches: Iterable[pa.Table], label: str, total: int) -> None:
        """Make the rows of all batches.

        Raises:
            InputError: the cluster cannot be reached, or has no such GPUs; or as a worker raised it.
            RunError: a worker raised something, or workers keep dying.
        """
        _connect(self._workers)
        import ray

        workers, gpus = self._resources()
        with _worklist(work, batches) as files, track(label, total, work.unit) as meter, warnings.catch_warnings():
            # Ray means to drop the two limits below in 2.64, and does not say what takes their place.
            warnings.simplefilter("ignore", DeprecationWarning)
            done = ray.data.from_items([{"batch": file} for file in files], override_num_blocks=len(files)).map_batches(
                _Worker,
                fn_constructor_args=(work, os.getcwd()),
                batch_size=1,
                num_cpus=1,
                num_gpus=gpus,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(files))),
                max_restarts=DEATHS,
                max_task_retries=DEATHS,
            )
            try:
                for row in done.iter_rows():
                    if row["trace"]:
                        log.debug("%s", row["trace"])
                        raise (InputError if row["is_input_error"] else RunError)(row["message"])
                    meter.advance(row["units"])
            except ray.exceptions.RayError as error:
                reason = one_line(str(error), LONGEST_REASON)
                raise RunError(f"{label}: Ray's workers failed ({reason}); what was made is kept") from error

    def _resources(self) -> tuple[int, float]:
        """Return how many workers, and how many GPUs each."""
        import ray

        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = there.get("GPU", 0.0)
        each = self._worker_gpus if self._worker_gpus is not None else float(gpus > 0)
        if each > gpus:
            raise InputError(f"--worker-gpus {each:g}: the cluster has {gpus:g} GPUs; lower it, or add nodes")
        most = int(gpus / each) if each else int(there.get("CPU", 1)) - 1
        return self._workers or max(most, 1), each


class _Worker:
    """An actor: the work, opened once. What it raises goes back as a row: Ray keeps no exception's type."""

    def __init__(self, work: Work, folder: str):
        if os.path.isdir(folder):  # where relative paths mean what they mean to the driver
            os.chdir(folder)
        self._work = work
        self._make: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        row: dict[str, Any] = {"units": 0, "is_input_error": False, "message": "", "trace": ""}
        try:
            self._make = self._make or self._work.open()
            for file in batch["batch"]:
                with file.open("rb") as content:
                    table = pq.read_table(content)
                row["units"] += sum(do_batch(self._work, self._make, table))
        except Exception as error:
            ours = isinstance(error, InputError | RunError)
            message = str(error) if ours else f"{type(error).__name__}: {cause(error)}"
            row |= {"is_input_error": isinstance(error, InputError), "message": message}
            row["trace"] = traceback.format_exc()
        return {name: [value] for name, value in row.items()}


def _connect(workers: int | None) -> None:
    """Connect to Ray, quietly, unless that was done before; what is started for it ends with this process."""
    import ray

    if not ray.is_initialized():
        there = os.environ.get("RAY_ADDRESS")
        if there:
            _check_answers(there)
        # A core more than there are workers: Ray Data itself wants one.
        own: dict[str, Any] = {"num_cpus": max(workers or 0, os.cpu_count() or 1) + 1, "include_dashboard": False}
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=there or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if there else own)
            )
        except ConnectionError as error:
            raise InputError(
                f"RAY_ADDRESS {there}: no Ray cluster lets us in there; correct it, or unset it (and see RAY_AUTH_MODE)"
            ) from error
        signal.signal(signal.SIGTERM, on_term)  # Ray's own ends the process without a word
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _check_answers(address: str) -> None:
    """Check that a cluster answers; Ray itself waits minutes for an absent one."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():  # `auto`, or another word of Ray's
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(f"RAY_ADDRESS {address}: no Ray cluster answers there; correct it, or unset it") from error


@contextmanager
def _worklist(work: Work, batches: Iterable[pa.Table]) -> Iterator[list[AnyPath]]:
    """Write each batch to a file beside the output, so that neither the driver nor Ray holds all in memory."""
    folder = work.outputs[-1].path / f"worklist-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        files = []
        for number, batch in enumerate(batches):
            file = folder / f"{number:08d}.parquet"
            with file.open("wb") as content:
                pq.write_table(batch, content)
            files.append(file)
        yield files
    finally:
        _remove(folder)


def _remove(folder: AnyPath) -> None:
    for file in folder.glob("*.parquet"):
        file.unlink()
    if folder.exists():
        folder.rmdir()
