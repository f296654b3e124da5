"""Locks between the processes of a machine, and making what is missing under them."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from cpo_pipe.data.errors import InputError

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")


class Lockable(Protocol):
    """Rows or a directory artifact, as `make_missing` sees them."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold while making what is missing."""
        ...


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock file; wait for it if needed. The system releases it when a process dies, however it dies.

    Args:
        file: the lock file; its folder is made.
        what: name of the guarded artifact or file, for messages.

    Raises:
        InputError: the file cannot be written.
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: another process is making it; waiting for it to finish", what)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(
            f"--store: no permission to write {what} there ({file.parent}); give one that you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_lock(file: Path, *, make: bool) -> Iterator[bool]:
    """Hold a lock file without waiting for it; yield whether nobody else holds it.

    Without `make`, an absent lock file counts as free and stays absent.
    """
    if make:
        file.parent.mkdir(parents=True, exist_ok=True)
    elif not file.exists():
        yield True
        return
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def make_missing(find: Callable[[], _Found], make: Callable[[_Found], None], *outputs: Lockable) -> _Found | None:
    """Make what is missing once among all processes of a machine; take the locks only if something is missing.

    Args:
        find: returns what is missing: a collection, an array of flags, or whether anything is. Asked again once the
            locks are held, because another process may have made it meanwhile.
        make: makes what is missing and records it in `outputs`.
        outputs: the artifacts to lock, in this order.

    Returns:
        What this call has made; None if nothing was missing.
    """
    if not _any(find()):
        return None
    with ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output.lock())
        missing = find()
        if not _any(missing):
            return None
        make(missing)
        return missing


def _any(found: Any) -> bool:
    return bool(found.any() if isinstance(found, np.ndarray) else found)
