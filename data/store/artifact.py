"""Folders of files that are complete or absent, with the hash of each file in their manifest."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import FileHashes, Spec, sha256_once
from cpo_pipe.data.store import atomic, checksums
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.locks import locked, make_missing
from cpo_pipe.data.store.paths import reported
from cpo_pipe.data.store.records import artifact_manifest, with_checksum

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger(__name__)


class Artifact:
    """A folder of files that is complete or absent (a checkpoint, prepared examples, …); made by `Store.artifact`.

    Of a remote store `path` is this machine's copy.
    """

    def __init__(self, path: Path, spec: Spec, hash_file: FileHashes, remote: "UPath | None" = None):
        self._folder = ArtifactFolder(path, path)
        self.path = path
        self.name = self._folder.name
        self.in_progress = self._folder.in_progress
        """Folder of its unfinished state, on this machine."""
        self.spec = spec
        self._hash_file = hash_file
        self._remote = remote

    @property
    def manifest(self) -> dict[str, Any]:
        """Return what `create` recorded: the files with their hashes, and the caller's facts."""
        content = artifact_manifest(self.path / "manifest.json")
        if content is None:
            raise RunError(f"{self.path / 'manifest.json'}: damaged; run the command again to make {self.name} again")
        return content

    def complete(self) -> bool:
        """Return whether it exists undamaged; download it from a remote store if this machine lacks it."""
        if self._remote is not None:
            return self._downloaded(self._remote)
        return self.path.exists() and self._is_undamaged()

    def _is_undamaged(self) -> bool:
        broken = self._broken()
        if broken is not None:
            log.warning("%s is damaged (%s); it will be quarantined and made again", self.name, broken)
        return broken is None

    def _broken(self) -> str | None:
        """Return the name of the first file that differs from the manifest, or why the folder is another artifact."""
        manifest = artifact_manifest(self.path / "manifest.json")
        if manifest is None:
            return "manifest.json"
        owner = manifest.get("artifact") or self._folder.spec_owner() or self.name
        if owner != self.name:
            return f"its files belong to {owner}"
        self._folder.repair_spec(self.spec)
        return next((name for name, sha256 in manifest["files"].items() if not self._is_valid(name, sha256)), None)

    def _is_valid(self, name: str, sha256: str) -> bool:
        file = self.path / name
        # A run with nothing to do reads all files but the weights, which `Model.check_weights` reads before their use.
        hash_file = self._hash_file if file.suffix == ".safetensors" else sha256_once
        return file.is_file() and hash_file(file) == sha256

    def make(self, fill: Callable[["ArtifactWriter"], None]) -> bool:
        """Make it unless it is complete; two processes of a machine make it once.

        Args:
            fill: writes the files into a new folder and sets the facts; called with the lock held.

        Returns:
            Whether this call made it.
        """

        def make(_: bool) -> None:
            with self.create() as writer:
                fill(writer)

        made = make_missing(lambda: not self.complete(), make, self) is not None
        if made:
            self.complete()  # of a remote store: another machine may have been first
        return made

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold while making it, so that two processes of a machine do not do the same.

        A damaged one is quarantined: its folder gets the name HASH.damaged-….
        """
        with locked(self._folder.lock, self.name):
            for leftover in self.path.parent.glob(f".tmp-*-{self.path.name}"):
                shutil.rmtree(leftover)
            remote = self._remote and self._remote / "manifest.json"
            if remote is not None and remote.exists() and not self.complete():
                remote.unlink()
            if self.path.exists() and self._broken() is not None:
                self.path.replace(self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}"))
            if self._remote is not None and self.path.exists():
                self._upload(self._remote)  # its maker may have been killed before it had
            yield

    @contextmanager
    def create(self) -> Iterator["ArtifactWriter"]:
        """Yield a writer with an empty folder, which becomes the artifact on success and is removed on an error."""
        writer = ArtifactWriter(atomic.temporary(self.path))
        writer.path.mkdir(parents=True)
        try:
            yield writer
            self._commit(writer)
        finally:
            shutil.rmtree(writer.path, ignore_errors=True)

    def _commit(self, writer: "ArtifactWriter") -> None:
        """Record the files of a finished folder, and rename it to the artifact."""
        for file in writer.path.rglob("*"):
            if file.is_file():
                atomic.sync(file)
        manifest = {"artifact": self.name, "files": checksums.hash_files(writer.path), **writer.facts}
        ArtifactFolder(writer.path, writer.path).write_spec(self.spec)
        text = json.dumps(with_checksum(manifest), indent=2, ensure_ascii=False)
        atomic.write_bytes(writer.path / "manifest.json", text.encode())
        if not (self.path / "manifest.json").exists():
            atomic.rename(writer.path, self.path)
        if self._remote is not None:
            self._upload(self._remote)

    def _upload(self, remote: "UPath") -> None:
        if (remote / "manifest.json").exists():  # made on another machine meanwhile
            return
        with reported(remote):
            for name in ("spec.json", *self.manifest["files"]):
                remote.fs.put_file(str(self.path / name), (remote / name).path)
        atomic.write_bytes(remote / "manifest.json", (self.path / "manifest.json").read_bytes())

    def _downloaded(self, remote: "UPath") -> bool:
        """Update this machine's copy from the remote store; return whether it is complete and undamaged."""
        try:
            recorded = (remote / "manifest.json").read_bytes()
        except FileNotFoundError:
            return False
        own = self.path / "manifest.json"
        with locked(self._folder.lock.parent / "download/lock", f"the copy of {self.name}"):
            if own.exists() and own.read_bytes() == recorded and self._broken() is None:
                return True
            scratch = self.path.with_name(f".download-{self.path.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            self._download(remote, recorded, scratch)
            shutil.rmtree(self.path, ignore_errors=True)
            atomic.rename(scratch, self.path)
            return self._is_undamaged()

    def _download(self, remote: "UPath", recorded: bytes, folder: Path) -> None:
        """Download an artifact into `folder`; files missing in the remote store stay missing."""
        atomic.write_bytes(folder / "manifest.json", recorded)
        manifest = artifact_manifest(folder / "manifest.json") or {"files": {}}
        for name in ("spec.json", *manifest["files"]):
            target = folder / name
            if target.resolve().is_relative_to(folder.resolve()):  # a manifest must not write elsewhere
                target.parent.mkdir(parents=True, exist_ok=True)
                with reported(remote), suppress(FileNotFoundError):
                    remote.fs.get_file((remote / name).path, str(target))


@dataclass(frozen=True)
class ArtifactWriter:
    """The folder of an artifact that is being made, and the facts for its manifest; yielded by `Artifact.create`."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
