"""The source that a location leads to: a file, a pattern, a folder, a URL or a data set on the hub."""

import glob
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.sources.data_sets import HubDataSet, SavedDataSet, saved_splits
from cpo_pipe.data.sources.files import SUPPORTED, Files, Folder, format_of
from cpo_pipe.data.sources.remote import download
from cpo_pipe.data.sources.source import Source
from cpo_pipe.data.store.atomic import write_bytes
from cpo_pipe.data.store.paths import cache_folder, shown

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_URL = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate_source(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    key: str = "data.source",
    columns_key: str | None = "data.columns",
    default_split: str = "train",
) -> Source:
    """Return the source that a location leads to; a URL is downloaded, a hub data set is pinned to its commit.

    Args:
        name: a file, a pattern such as `data/*.jsonl`, a folder, a URL (`hf://`, `s3://`, `https://`, …), or the name
            of a data set on the hub.
        subset: of a folder or a hub data set.
        split: of a folder or a hub data set; None: `default_split`.
        revision: of a hub data set.
        key: the key of the recipe that names the source, for messages.
        columns_key: the key of its column mapping; None: the columns' names are fixed.
        default_split: the split where none is given.

    Raises:
        InputError: no such file, folder or data set, the format is not supported, or an option is not used.
    """
    keys: dict[str, Any] = {"key": key, "columns_key": columns_key}

    def unused(kind: str, **options: str | None) -> None:
        """Refuse options that a kind of source does not use."""
        given = next((option for option, value in options.items() if value is not None), None)
        if given is not None:
            option = f"{key.rpartition('.')[0]}.{given}"
            raise InputError(f"{option}: not used by {kind} ({key} {name}); remove it")

    hub = _HUB_URL.fullmatch(name)
    if hub is not None:
        if hub["revision"]:
            unused("a URL with a revision", revision=revision)
        commit = _hub_commit(hub["name"], hub["revision"] or revision, key)
        return HubDataSet(name=hub["name"], commit=commit, subset=subset, split=split or default_split, **keys)
    path = Path(name.removeprefix("file://"))
    if "://" in name and not name.startswith("file://"):
        unused("a URL", revision=revision)
        found = download(name, key)
        name = shown(name)
        if isinstance(found, dict):
            unused("files", subset=subset, source_split=split)
            return Files(name=name, paths=_supported(found, key, name), **keys)
        path = found
    if path.is_dir():
        unused("a folder", revision=revision)
        splits = saved_splits(path)
        if splits is None:
            return Folder(name=name, path=path, subset=subset, split=split or default_split, **keys)
        unused("a folder that save_to_disk wrote", subset=subset)
        if not splits:
            unused("a data set without splits", source_split=split)
        return SavedDataSet(name=name, path=path, split=split or default_split, **keys)
    kind = format_of(path)
    if glob.has_magic(str(path)) and not path.exists():
        unused("files", subset=subset, source_split=split, revision=revision)
        return Files(name=name, paths=_supported(_matching(path, key), key, name), **keys)
    if kind is None and not path.is_file() and _HUB_NAME.fullmatch(name):
        return HubDataSet(
            name=name, commit=_hub_commit(name, revision, key), subset=subset, split=split or default_split, **keys
        )
    if not path.is_file():
        if kind is not None:
            raise InputError(f"{key} {name}: no such file; give the path of a file in one of the formats {SUPPORTED}")
        raise InputError(f"{key} {name}: no such file or folder, and not the name of a Hugging Face data set")
    if kind is None:
        suffix = "".join(path.suffixes[-2:])
        raise InputError(f"{key} {name}: suffix {suffix!r} is not supported; convert it to one of {SUPPORTED}")
    unused("a file", subset=subset, source_split=split, revision=revision)
    return Files(name=name, paths={path.name: path}, **keys)


def _matching(pattern: Path, key: str) -> dict[str, Path]:
    """Return the files that match a pattern, by their labels, in the order of their paths."""
    found = [Path(file) for file in sorted(glob.glob(str(pattern), recursive=True))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise InputError(f"{key} {pattern}: no file matches; correct the pattern")
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    return {str(file.relative_to(fixed)): file for file in files}


def _supported(files: dict[str, Path], key: str, name: str) -> dict[str, Path]:
    """Return files after a check of their formats."""
    for label in files:
        if format_of(label) is None:
            raise InputError(f"{key} {name}: the format of {label} is not supported; convert it to {SUPPORTED}")
    return files


def _hub_commit(name: str, revision: str | None, key: str) -> str:
    """Return the commit of a hub data set; without a network, the one that was found last.

    It is recorded in the cache folder, because a data set that is streamed leaves nothing in the hub's own cache.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    recorded = cache_folder() / "hub-commits" / digest([name, revision or "main"], 16)
    try:
        commit = str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the hub client's failures have no common type: offline, not found, gated, …
        folder = f"datasets--{name.replace('/', '--')}"
        of_hub = Path(constants.HF_HUB_CACHE) / folder / "refs" / (revision or "main")
        for file in (recorded, of_hub):
            if file.is_file():
                return file.read_text().strip()
        raise InputError(
            f"{key} {name}: no such file or folder, and the hub gave no such data set ({cause(error)})"
        ) from error
    with suppress(OSError):  # a cache folder that may not be written to
        write_bytes(recorded, commit.encode())
    return commit
