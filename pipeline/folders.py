"""Folders that a command writes for the user: complete or absent, and never over what is there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpo_pipe.data import atomic
from cpo_pipe.data.errors import InputError


def check_new(out: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        InputError: it has, or it is no folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: is there already; name a folder that is new or empty")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A scratch folder that becomes `out` where all went well, and else goes.

    Raises:
        InputError: `out` has something in it.
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
