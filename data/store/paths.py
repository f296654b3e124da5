"""Where a store is: a folder, or a URL of an object store through fsspec."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cpo_pipe.data.errors import LONGEST_REASON, InputError, cause
from cpo_pipe.data.text import one_line

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"
"""A `Path` is local, anything else remote."""

_REQUESTS = 8
"""Files that are read at the same time: an object store answers each in tens of milliseconds."""
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def open_root(root: str | Path) -> AnyPath:
    """Return the root of a store; a folder is made, a bucket is not.

    Raises:
        InputError: it cannot be made, reached or read, or the package for its protocol is missing.
    """
    if not is_local(root):
        return _open_url(str(root))
    path = local_root(root)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--store {path}: cannot be made ({error.strerror}); give a folder you may write to"
        ) from error
    return path


def is_local(root: str | Path) -> bool:
    """Return whether a root is a folder of this machine, and not a URL of an object store."""
    return "://" not in str(root) or str(root).startswith("file://")


def local_root(root: str | Path) -> Path:
    """Return the folder that a local root names."""
    return named_folder(str(root).removeprefix("file://"), "--store")


def named_folder(text: str, option: str) -> Path:
    """Return the folder that an option or variable names, with ~ as the home folder.

    Raises:
        InputError: the text is empty, or names the home folder of an unknown user.
    """
    if not text.strip():
        raise InputError(f"{option} is empty, which would mean the current folder; name a folder")
    folder = Path(os.path.expanduser(text))
    if text.startswith("~") and folder == Path(text):
        raise InputError(f"{option} {text}: no such user; for a folder of that name give ./{text}")
    return folder


def _open_url(url: str) -> "UPath":
    from upath import UPath

    protocol, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise InputError(f"--store {url}: names no bucket; give one, such as {protocol}://bucket/prefix")
    with reported(url):
        try:
            root = UPath(url, use_listings_cache=False)  # what other processes write must be seen
            files = root.fs
        except ValueError as error:
            raise InputError(
                f"--store {shown(url)}: no such protocol as {protocol}; give a folder or a URL that fsspec knows "
                "(s3://…)"
            ) from error
        try:
            files.ls(root.path)
        except FileNotFoundError:  # it is empty, or the bucket does not exist
            try:
                files.info(root.anchor.rstrip("/") or root.anchor)
            except PermissionError:  # who may use one prefix of a bucket may not always ask for the bucket
                pass
            except FileNotFoundError:
                raise InputError(f"--store {shown(root)}: no such bucket; create it, or correct the name") from None
    return root


@contextmanager
def reported(url: "str | UPath", key: str = "--store") -> Iterator[None]:
    """Turn the failures of a remote file system, but for missing files, into an `InputError` that begins with `key`."""
    place = f"{key} {shown(url)}"
    try:
        yield
    except (FileNotFoundError, InputError):
        raise
    except ImportError as error:
        protocol = str(url).partition("://")[0]
        fix = "pip install 'cpo-pipe[s3]'" if protocol in ("s3", "s3a") else reason(error)
        raise InputError(f"{place}: a package is missing for {protocol}://; {fix}") from error
    except PermissionError as error:
        raise InputError(
            f"{place}: no permission ({reason(error)}); check the credentials in the environment"
        ) from error
    except Exception as error:  # of the libraries below fsspec; not all are OSErrors
        raise InputError(
            f"{place}: cannot be reached ({reason(error)}); "
            "check the network, the endpoint (for S3 AWS_ENDPOINT_URL) and the credentials in the environment"
        ) from error


def shown(root: "str | AnyPath") -> str:
    """Return a root as messages and records name it: absolute, without credentials."""
    return str(root.resolve()) if isinstance(root, Path) else _without_credentials(str(root))


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]*:[^/@\s]*@", "//", text)


def reason(error: Exception) -> str:
    """Return a library's error as messages show it: in one line, without credentials."""
    return one_line(_without_credentials(cause(error, None)), LONGEST_REASON)


def local_folder(root: AnyPath) -> Path:
    """Return where this machine keeps what must be local: of a local root itself, of a remote one a folder of its own.

    That is CPO_PIPE_CACHE, else ~/.cache/cpo-pipe.
    """
    if isinstance(root, Path):
        return root
    return cache_folder() / hashlib.sha256(str(root).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of local copies: CPO_PIPE_CACHE, else ~/.cache/cpo-pipe."""
    return named_folder(os.environ.get("CPO_PIPE_CACHE") or "~/.cache/cpo-pipe", "CPO_PIPE_CACHE").absolute()


def in_parallel(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Yield results in order, several at a time."""
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
