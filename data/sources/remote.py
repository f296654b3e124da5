"""Local copies of files behind URLs that fsspec knows: hf://, s3://, https:// and others."""

import glob
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.store.paths import cache_folder, reason, reported, shown

log = logging.getLogger(__name__)

_VERSION_KEYS = (
    "etag",
    "content-md5",
    "last-modified",
    "lastmodified",
    "last_modified",
    "blob_id",
    "md5hash",
    "created",
)
"""What file systems record of a file that changes with its content, in lower case."""


def download(url: str, key: str) -> Path | dict[str, Path]:
    """Return the local copy of the file or folder at a URL, or of the files that match a pattern, by their labels.

    Copies are in `sources/` of the cache folder, by the versions that the server names. A file without a version is
    downloaded each time.

    Args:
        url: with the name of a protocol.
        key: the key of the recipe that names the URL, for messages.

    Raises:
        InputError: the URL cannot be read, or a package for its protocol is missing.
    """
    import fsspec

    protocol, place = url.partition("://")[0], f"{key} {shown(url)}"
    with reported(url, key):
        try:
            system, path = fsspec.core.url_to_fs(url)
            system.invalidate_cache()
            found, is_folder = _files(system, path, protocol)
            if not found:
                raise InputError(f"{place}: no file matches; correct the URL")
            versions = {name: _version(info) for name, (_, info) in found.items()}
            folder = cache_folder() / "sources" / digest([shown(url), versions], 16)
            for name, (remote, _) in found.items():
                local = folder / name
                if local.is_file() and versions[name] is not None:
                    continue
                log.info("%s: downloading %s", place, name)
                local.parent.mkdir(parents=True, exist_ok=True)
                scratch = local.with_name(f".tmp-{uuid.uuid4().hex}")
                try:
                    system.get_file(remote, str(scratch))
                    os.replace(scratch, local)
                finally:
                    scratch.unlink(missing_ok=True)
            copies = {name: folder / name for name in found}
            return folder if is_folder else copies if len(copies) > 1 else next(iter(copies.values()))
        except FileNotFoundError as error:
            raise InputError(f"{place}: not found ({reason(error)}); correct the URL, or check the network") from error
        except ValueError as error:
            if "Protocol not known" not in str(error):
                raise
            raise InputError(f"{place}: unknown protocol {protocol}; give a path or a URL that fsspec knows") from error


def _files(system: Any, path: str, protocol: str) -> tuple[dict[str, tuple[str, Mapping[str, Any]]], bool]:
    """Return the remote path and facts of each file by its local name, and whether they are a folder."""
    if protocol.startswith("http"):  # knows neither folders nor patterns, and ? begins a query
        return {PurePosixPath(urlsplit(path).path).name or "index": (path, system.info(path))}, False
    pattern = glob.has_magic(path) and not system.exists(path)
    if pattern:
        fixed = next(parent for parent in PurePosixPath(path).parents if not glob.has_magic(str(parent)))
        found = system.glob(path, detail=True)
    elif system.isfile(path):
        return {PurePosixPath(path).name: (path, system.info(path))}, False
    else:
        fixed, found = PurePosixPath(path), system.find(path, detail=True)
        if not found:
            raise FileNotFoundError(path)
    files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    names = {name: PurePosixPath(name).relative_to(fixed) for name in files}
    shown_names = {name: local for name, local in names.items() if not any(part[0] == "." for part in local.parts)}
    return {str(local): (name, files[name]) for name, local in shown_names.items()}, not pattern


def _version(info: Mapping[str, Any]) -> str | None:
    """Return what identifies the version of a remote file; None where nothing does."""
    known = {name.lower(): str(value) for name, value in info.items() if name.lower() in _VERSION_KEYS and value}
    return digest([known, info.get("size")]) if known else None
