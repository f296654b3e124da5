"""Folders that a command writes for the user: complete or absent, and never over existing files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store import atomic


def check_new(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        InputError: the path is a file or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: already exists; name a folder that is new or empty")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` on success and is removed on an error.

    Raises:
        InputError: `out` is not empty.
    """
    check_new(out)
    out = out.resolve()  # of a link the folder it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = atomic.temporary(out)
    try:
        scratch.mkdir()
        yield scratch
        for file in scratch.rglob("*"):
            atomic.sync(file)
        atomic.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
