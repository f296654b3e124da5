"""What a run is doing, for `cpo-pipe status` in another terminal: `status.json` in its folder, kept up to date."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.progress import Step, duration_text
from cpo_pipe.data.store import atomic
from cpo_pipe.data.store.records import Record, read_record
from cpo_pipe.data.text import nearest, one_line, say
from cpo_pipe.runs import LATEST, RUNS, RunFolder, all_runs

FILE = "status.json"
RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
CLOCK_SECONDS = 60.0
"""By how much the clock may be set while a run goes on."""
KILLED = "killed, its process is gone"


class Status(logging.Handler):
    """Writes the status of a run into its folder; as a handler of the log, it keeps the last warning."""

    def __init__(self, run_dir: Path):
        super().__init__(logging.WARNING)
        self._path = run_dir / FILE
        self._content: Record = {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}

    @contextmanager
    def stage(self, name: str, number: str, last: bool) -> Iterator[None]:
        """Record that a stage is in progress, and how it ends; until the last one the run goes on."""
        self._content |= {"stage": name, "number": number, "step": None}
        self._write(RUNNING)
        logging.getLogger("cpo_pipe").addHandler(self)
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            logging.getLogger("cpo_pipe").removeHandler(self)
        self._write(DONE if last else RUNNING)

    def fail(self, error: BaseException) -> None:
        """Record that the run ended with an error, or was stopped."""
        stopped = isinstance(error, KeyboardInterrupt)
        self._content["error"] = "" if stopped else one_line(str(error) or type(error).__name__, 500)
        self._write(STOPPED if stopped else FAILED)

    def progress(self, step: Step) -> None:
        """Record how far the stage is."""
        self._content["step"] = asdict(step)
        self._write(RUNNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning; it is written with the progress that follows."""
        self._content["warning"] = {"at": time.time(), "text": one_line(record.getMessage(), 500)}

    def _write(self, state: str) -> None:
        self._content |= {"state": state, "updated": time.time()}
        with suppress(OSError):  # a full disk must not end a training
            atomic.write_bytes(self._path, json.dumps(self._content).encode())


def print_status(name: str | None, root: Path = RUNS) -> None:
    """Print what the latest run of a recipe is doing, or of each recipe; `name` may also be a run's folder.

    Raises:
        InputError: there is no such run.
    """
    if name is not None:
        folders = [path for path in (root / name / LATEST, root / name, Path(name)) if (path / FILE).is_file()]
        if not folders:
            near = nearest(name, {run.path.parent.name for run in all_runs(root)})
            raise InputError(f"status {name}: no run of this recipe in {root}; {near or '`cpo-pipe runs` lists them'}")
        found = folders[:1]
    else:
        found = [path.parent for path in root.glob(f"*/{LATEST}/{FILE}")]
    read = [(RunFolder(path.resolve()), read_record(path / FILE)) for path in found]
    known = [(run, content) for run, content in read if content is not None]
    if not known:
        say(f"no run in {root} has begun")
    for run, content in sorted(known, key=lambda pair: -pair[1].get("updated", 0)):
        for number, line in enumerate(_described(run, content)):
            say(f"{'  ' if number else ''}{one_line(line)}")


def _described(run: RunFolder, content: Record) -> Iterator[str]:
    """Yield what a status says, in lines."""
    state, ago = content.get("state"), time.time() - content.get("updated", 0)
    here = content.get("host") == socket.gethostname()
    if state == RUNNING and here and not _lives(content):
        state = KILLED
    stage = " ".join(filter(None, ("stage", content.get("number"), content.get("stage"))))
    process = f"pid {content.get('pid')} on {content.get('host')}"
    yield f"{run.label}: {state} ({process}), {stage}, {duration_text(ago)} ago"
    step: Any = content.get("step")
    if step and state != DONE:
        yield str(Step(**step))
    if content.get("error"):
        yield f"error: {content['error']}"
    if warning := content.get("warning"):
        at = time.strftime("%H:%M:%S", time.localtime(warning["at"]))
        yield f"last warning, {at}: {warning['text']}"
    if state not in (RUNNING, DONE):
        yield "what was made is kept: run the same command again to go on"


def _lives(content: Record) -> bool:
    """Return whether the process of a status is there; the clock may have been set since it began."""
    born = _born(content["pid"])
    return born is not None and abs(born - (content.get("born") or 0)) < CLOCK_SECONDS


def _born(pid: int) -> float | None:
    """Return when a process began, in seconds since 1970; None if it is gone. A pid may be used again."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
