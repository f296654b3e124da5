"""The small JSON files of a store and of a run folder: how they are read, and what a damaged one is.

A file that was cut, emptied, overwritten or has another form is None here. Whoever reads it says so, and makes it again
or names it.
"""

import hashlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_pipe.data.fingerprint import sha256_once
from cpo_pipe.data.store.paths import AnyPath

Record = dict[str, Any]

TRAIN = "train "
"""What the stage of a training is called in run.json, before its name."""
CHECKSUM = "checksum"
"""The field with a record's own checksum."""


def read_record(path: AnyPath) -> Record | None:
    """Return the object in a JSON file; None where it is gone or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get(CHECKSUM) in (None, checksum(content)) else None


def checksum(record: Record) -> str:
    """Return the checksum of a record's other fields, as they are read back."""
    content = json.loads(json.dumps({name: value for name, value in record.items() if name != CHECKSUM}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def with_checksum(record: Record) -> Record:
    """Return the record with its own checksum in it."""
    return {**record, CHECKSUM: checksum(record)}


def shard_manifest(path: AnyPath) -> Record | None:
    """Return the manifest of a shard; None where it is gone or damaged."""
    content = read_record(path) or {}
    fields = (("rows", int), ("bytes", int), ("sha256", str))
    return content if all(isinstance(content.get(name), kind) for name, kind in fields) else None


def artifact_manifest(path: AnyPath) -> Record | None:
    """Return the manifest of a directory artifact; None where it is gone or damaged, or lists no files."""
    content = read_record(path) or {}
    files = content.get("files")
    valid = isinstance(files, dict) and files and all(isinstance(sha256, str) for sha256 in files.values())
    return content if valid else None


@dataclass(frozen=True)
class Registration:
    """A run folder and the artifacts that its run asked for."""

    run_dir: Path
    host: str
    artifacts: frozenset[str]
    file: AnyPath

    @property
    def remote(self) -> bool:
        """Return whether it is of another machine, whose folders cannot be seen from here."""
        return self.host != socket.gethostname()

    @property
    def missing(self) -> bool:
        """Return whether its run folder was moved or deleted."""
        return not self.remote and not self.run_dir.exists()

    @property
    def name(self) -> str:
        """Return the folder, and the machine where that is another one."""
        return f"{self.run_dir}@{self.host}" if self.remote else str(self.run_dir)

    @property
    def label(self) -> str:
        """Return the last two folders of its path: a recipe's name and its version, where nobody named the folder."""
        return "/".join(self.run_dir.parts[-2:])

    @property
    def trainings(self) -> dict[str, list[str]]:
        """Return the names of its trainings by checkpoint, as far as its run.json can be read here."""
        found: dict[str, list[str]] = {}
        for stage, made in ((run_record(self.run_dir) if not self.remote else None) or {"stages": {}})[
            "stages"
        ].items():
            if stage.startswith(TRAIN) and isinstance(made.get("artifact"), str):
                found.setdefault(made["artifact"], []).append(stage.removeprefix(TRAIN))
        return found

    @property
    def state(self) -> str:
        """Return what messages add to the folder's name: its machine, if not this one, and whether it is missing."""
        return f"@{self.host}" if self.remote else "(missing)" if self.missing else ""


def registration(path: AnyPath) -> Registration | None:
    """Return what a run registered; None where it is gone or damaged."""
    content = read_record(path) or {}
    run_dir, host, artifacts = (content.get(name) for name in ("run_dir", "host", "artifacts"))
    if not (isinstance(run_dir, str) and isinstance(host, str) and isinstance(artifacts, list)):
        return None
    if not all(isinstance(name, str) for name in artifacts):
        return None
    return Registration(Path(run_dir), host, frozenset(artifacts), path)


def run_record(run_dir: Path) -> Record | None:
    """Return what run.json says of a run's stages; None where it is gone or damaged."""
    content = read_record(run_dir / "run.json") or {}
    stages = content.get("stages")
    if not (isinstance(content.get("report", {}), dict) and isinstance(stages, dict)):
        return None
    if not all(isinstance(stage, dict) for stage in stages.values()):
        return None
    if not all(isinstance(stage.get("apis", {}), dict) for stage in stages.values()):
        return None
    times = [stage.get("seconds") for stage in stages.values()]
    times += [stage.get(name, 0) for stage in stages.values() for name in ("started", "total_seconds")]
    return content if all(isinstance(value, int | float) for value in times) else None


def changed_files(run_dir: Path, record: Record) -> list[str]:
    """Return the files beside the report, and the report itself, that are no longer as they were written."""
    report = record.get("report")
    files = report.get("files") if isinstance(report, dict) else None
    if not isinstance(files, dict):
        return []
    return [name for name, sha256 in files.items() if not _is_as_written(run_dir / name, sha256)]


def _is_as_written(file: Path, sha256: str) -> bool:
    return file.is_file() and sha256_once(file) == sha256
