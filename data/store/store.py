"""The artifact store: row tables that only grow, and directory artifacts, named by the hash of their spec.

Killed at any instant, a writer loses at most the shard in flight; a reader never sees half of anything.
"""

import json
import logging
import os
import socket
from pathlib import Path

from cpo_pipe.data.fingerprint import FileHashes, Spec, content_hash, digest
from cpo_pipe.data.store import atomic
from cpo_pipe.data.store.artifact import Artifact
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.locks import locked
from cpo_pipe.data.store.paths import local_folder, open_root, shown
from cpo_pipe.data.store.records import registration
from cpo_pipe.data.store.rows import Rows

log = logging.getLogger(__name__)


class Store:
    """Artifacts shared by all runs that point to them.

    Args:
        root: a folder, or a URL that fsspec knows: with the extra `s3` such as s3://bucket/prefix. Credentials and
            endpoint come from the environment (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or a
            profile), on every machine that opens the store.

    On a remote root one put is complete or absent, and the put of the manifest commits. No lock exists between
    machines: two may do the same work, and of duplicate rows the first stays. Directory artifacts are files on this
    machine, uploaded when they are made and downloaded when they are first asked for.

    Raises:
        InputError: the root cannot be made or reached.
    """

    def __init__(self, root: str | Path):
        self.root = open_root(root)
        self.local = local_folder(self.root)
        """Where directory artifacts are on this machine; a local root itself."""
        self.local.mkdir(parents=True, exist_ok=True)
        self.used: set[str] = set()
        """Names of the artifacts that were asked for."""
        self._run_dir: Path | None = None
        self.hash_file = FileHashes(self.local / "file-hashes.json", atomic.write_bytes)
        self._rows: dict[str, Rows] = {}

    @property
    def name(self) -> str:
        """Return the root as records name it."""
        return shown(self.root)

    def rows(self, kind: str, spec: Spec) -> Rows:
        """Return the table of this kind and spec; nothing is written until rows are."""
        name = self._name(kind, spec)
        if name not in self._rows:
            self._rows[name] = Rows(ArtifactFolder(self.root / name, self.local / name), spec)
        return self._rows[name]

    def artifact(self, kind: str, spec: Spec) -> Artifact:
        """Return the directory artifact of this kind and spec, made or not."""
        name = self._name(kind, spec)
        remote = None if isinstance(self.root, Path) else self.root / name
        return Artifact(self.local / name, spec, self.hash_file, remote)

    def register_run(self, run_dir: Path) -> None:
        """Register the artifacts that a run has asked for, and will ask for: `store gc` keeps them.

        Recorded in <root>/.runs, one file per run folder and machine, before anything is made or read.
        """
        self._run_dir = run_dir.absolute()
        self._register()

    def _register(self) -> None:
        run = {"run_dir": str(self._run_dir), "host": socket.gethostname()}
        path = self.root / ".runs" / f"{digest(run)}.json"
        if isinstance(self.root, Path) and not os.access(self.root, os.W_OK):
            return  # a read-only store: everything must be there already, and nobody here can delete from it
        with locked(self.local / ".locks/runs/lock", "the list of runs"):  # two commands may be in one folder
            known = registration(path)
            if known is None and path.exists():
                log.warning("%s is damaged; written again with what this run uses. `cpo-pipe store gc` no longer knows "
                            "what its folder used before with other settings", path)  # fmt: skip
            before = known.artifacts if known is not None else frozenset()
            if known is None or not self.used <= before:
                content = {**run, "artifacts": sorted(before | self.used)}
                atomic.write_bytes(path, json.dumps(content, indent=2).encode())

    def _name(self, kind: str, spec: Spec) -> str:
        name = f"{kind}/{content_hash(spec)}"
        if name not in self.used:
            self.used.add(name)
            if self._run_dir is not None:
                self._register()
        return name
