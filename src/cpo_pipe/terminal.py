"""Shared by all commands: log lines, failures as one line with an exit status, and common options."""

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.logging import RichHandler

from cpo_pipe.data.errors import InputError, Problems, RunError
from cpo_pipe.data.execution import processes
from cpo_pipe.data.progress import console, show_bars
from cpo_pipe.data.store.paths import named_folder
from cpo_pipe.data.text import one_line, say, visible

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar="CPO_PIPE_STORE", help="Folder of the artifact store, or a URL such as s3://bucket/folder."
    ),
]


def folder(text: str) -> Path:
    """Return the folder that an option names; refuse an empty text, which `Path` takes for the current folder."""
    try:
        return named_folder(text, "it")
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default="off")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Log only warnings and errors, without progress.", show_default="off")
]
LogFormat = Literal["text", "json"]
LogFormatOption = Annotated[LogFormat, typer.Option("--log-format", help="Write the log as text, or JSON per line.")]
DEFAULT_STORE = "cpo-store"

# Errors of a path that the user can correct.
_PATH_TROUBLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
                 errno.ELOOP}  # fmt: skip
_DISK_FULL = ("No space left on device", "Disk quota exceeded")


class _Record(logging.LogRecord):
    """A log record whose text cannot control a terminal, also for libraries with a handler of their own."""

    def getMessage(self) -> str:
        text = super().getMessage()
        return one_line(text) if self.name.startswith("cpo_pipe") else visible(text)


class _Formatter(logging.Formatter):
    """Format tracebacks, too, as text that cannot control a terminal."""

    def formatException(self, ei: Any) -> str:
        return visible(super().formatException(ei))


@contextmanager
def _visible_logs(handler: logging.Handler) -> Iterator[None]:
    """Send the log and the warnings of libraries to a handler, as text that cannot control a terminal."""
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_Record)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(before)


class _Json(logging.Formatter):
    """One JSON object per line, with the figures of progress."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        if (progress := getattr(record, "progress", None)) is not None:
            content["progress"] = progress
        return json.dumps(content, ensure_ascii=False)


HEADINGS = "cpo_pipe.run_log"
"""The logger of stages, which a sweep repeats."""


AGAIN_SECONDS = 600.0
"""After this time a message is news again: a server that did not answer an hour ago does not answer now."""


class _Once(logging.Filter):
    """Lets each message through once in a while: what is said of one system is often true of all."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[int, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("cpo_pipe") or record.name == HEADINGS or record.levelno < logging.INFO:
            return True
        said = record.levelno, record.getMessage()
        if record.created - self._said.get(said, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return False
        self._said[said] = record.created
        return True


def _handler(log_format: LogFormat) -> logging.Handler:
    """Return what writes the log: for people with bars on a terminal, with the time elsewhere, or as JSON."""
    if log_format == "json":
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None,
                              log_time_format="%H:%M:%S")  # fmt: skip
        handler.setFormatter(_Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_Once())
    return handler


@contextmanager
def reported(debug: bool, quiet: bool = False, log_format: LogFormat = "text") -> Iterator[None]:
    """Log to the terminal; show a failure as one line and exit: 2 for invalid input, 1 for a failure at run time.

    Args:
        debug: also log what only developers need, and show tracebacks.
        quiet: log only warnings, and show no progress.
        log_format: how the log is written.
    """
    handler = _handler(log_format)
    show_bars(log_format == "text" and not quiet)
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.getLogger("cpo_pipe").setLevel(level if processes.is_main() else logging.ERROR)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with _visible_logs(handler):
            yield
    except KeyboardInterrupt as error:
        if processes.is_main():
            _close("", f"stopped{error}; what was made is kept: run the same command again to go on", log_format)
        raise typer.Exit(130) from error
    except typer.Exit:
        raise
    except BrokenPipeError as error:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error
    except Exception as error:
        if debug:
            say(traceback.format_exc(), file=sys.stderr)
        status, text = _failure(error)
        for message in error.messages if isinstance(error, Problems) else [text]:
            _close("error: ", message, log_format)
        raise typer.Exit(status) from error


def _close(kind: str, message: str, log_format: LogFormat) -> None:
    """Write why a command ends: as a line that begins with its kind, or as JSON."""
    if log_format == "json":
        logging.getLogger("cpo_pipe").error("%s", message)
    else:
        say(f"{kind}{one_line(message)}", file=sys.stderr)


def _stop(*_: object) -> None:
    """Stop as Ctrl-C does, also where SIGINT is ignored: a script started this in the background (`cpo-pipe … &`)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _failure(error: Exception) -> tuple[int, str]:
    """Return the exit status and the message of an error."""
    if isinstance(error, InputError | RunError):
        return 2 if isinstance(error, InputError) else 1, str(error)
    # Libraries written in Rust and C++ have their own types for a full disk.
    if any(sign in str(error) for sign in _DISK_FULL):
        return 1, "the disk is full; what was made before is kept: free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in _PATH_TROUBLE:
        reason = (error.strerror or "").lower()
        return 2, f"{error.filename}: {reason}; give a path that can be used (--store, --run-dir, or in the recipe)"
    text = str(error).strip() or "no message"
    return 1, f"{type(error).__name__}: {text[:500]} (--debug shows the traceback)"
