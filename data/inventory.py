"""What stands in a store, told from specs and manifests alone; whether it is sound; and what no run needs.

A run registers each artifact before it makes or reads it, so that "no run needs it" takes no walk from spec to spec:

    <root>/.runs/*.json   one per run folder: {"run_dir": …, "host": …, "artifacts": ["kind/address", …]}
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec, address, canonical_json, distrust, sha256_file
from cpo_pipe.data.recipe import nearest
from cpo_pipe.data.records import (
    Record,
    Registration,
    changed_files,
    product_manifest,
    read_record,
    registration,
    run_record,
    shard_manifest,
)
from cpo_pipe.data.roots import is_local, local_folder, local_root, open_root, shown
from cpo_pipe.data.schemas import EXAMPLES, METRICS, REJECTED, TABLES, Table
from cpo_pipe.data.store import foreign

KINDS = (
    "tokenizers",
    "chat-dates",
    "examples",
    "negatives",
    "groups",
    "rejected",
    "reference-logprobs",
    "checkpoints",
    "generations",
    "verdicts",
    "metrics",
)
"""In the order in which a run makes them."""

_ADDRESS = re.compile(r"[0-9a-f]{16}")
_ANSWERS = ("negatives", "rejected", "generations", "verdicts")
"""Kinds whose rows may be answers of an API."""
_REQUESTS = 8
"""Manifests that are read at the same time: an object store answers each in tens of milliseconds."""
_PRODUCT_TABLES = {
    ("examples", "examples.parquet"): EXAMPLES,
    ("examples", "rejected.parquet"): REJECTED,
    ("metrics", "metrics.parquet"): METRICS,
}


@dataclass(frozen=True)
class Artifact:
    """What the store holds for a kind and an address: rows, a product, or the rest of one. Each file is read once."""

    path: Path

    @property
    def kind(self) -> str:
        """The kind of artifact."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.kind}/{self.path.name}"

    @property
    def table(self) -> Table | None:
        """Schema and key of its rows; None of a product."""
        return TABLES.get(self.kind)

    @cached_property
    def spec(self) -> Spec | None:
        """What decided its values; None where spec.json is gone or unreadable."""
        return read_record(self.path / "spec.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of a product; empty where it is gone or unreadable."""
        return product_manifest(self.path / "manifest.json") or {}

    @cached_property
    def shards(self) -> dict[str, dict[str, Any]]:
        """Manifests of the recorded shards by their names, oldest first; one that is unreadable is empty."""
        paths = sorted(self.path.glob("manifests/[!.]*.json"))
        found = {path.stem: content for path, content in zip(paths, _shard_manifests(paths), strict=True)}
        # Of a merge that was killed half-way both are there: the merged shard, and some of those that it replaces.
        merged = {name for manifest in found.values() for name in manifest.get("merged", ())}
        return {name: manifest for name, manifest in found.items() if name not in merged}

    @cached_property
    def files(self) -> dict[str, int]:
        """Sizes of the data files in bytes by their paths: as recorded of shards, as found of a product's files."""
        if self.table:
            return {f"shards/{name}.parquet": manifest.get("bytes", 0) for name, manifest in self.shards.items()}
        return {name: _size(self.path / name) for name in self.manifest.get("files", ())}

    @property
    def size(self) -> int:
        """Of the data files, in bytes."""
        return sum(self.files.values())

    @property
    def rows(self) -> int | None:
        """As recorded; None of a product that is no table."""
        if self.table:
            return int(sum(manifest.get("rows", 0) for manifest in self.shards.values()))
        counts: dict[str, int] | None = self.manifest.get("examples")
        return None if counts is None else sum(counts.values())

    @property
    def written(self) -> float | None:
        """When it last grew, in seconds since 1970; None where nothing says."""
        if self.table:  # a shard's name says when it was begun
            names = [part for name, manifest in self.shards.items() for part in (name, *manifest.get("merged", ()))]
            return int(max(names).partition("-")[0]) / 1e9 if names else None
        with suppress(OSError):
            return (self.path / "manifest.json").stat().st_mtime or None
        return None


class Inventory:
    """A store as it stands. Makes nothing, not even the folder.

    Args:
        root: as of `Store`.

    Raises:
        InputError: there is no such folder, or the URL cannot be reached.
    """

    def __init__(self, root: str | Path):
        if is_local(root) and not local_root(root).is_dir():
            raise InputError(f"--store {root}: no such folder; give the store of a run")
        opened: Any = open_root(root)
        self.root: Path = opened  # or a UPath, whose methods are the same
        self._local = local_folder(self.root)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """All of them, or those of one kind, in the order in which a run makes them.

        Raises:
            InputError: the store has nothing of this kind.
        """
        kinds = self._kinds()
        if kind is not None and kind not in kinds:
            hint = nearest(kind, kinds) or f"there are {', '.join(kinds) or 'none'}"
            raise InputError(f"kind {kind}: nothing of it in {shown(self.root)}; {hint}")
        found = (
            Artifact(path) for name in ([kind] if kind else kinds) for path in sorted((self.root / name).iterdir())
        )
        return [artifact for artifact in found if _ADDRESS.fullmatch(artifact.path.name) and _stands(artifact.path)]

    def find(self, name: str) -> Artifact:
        """The artifact of a name: kind/address, where an address may be cut and a kind left out.

        Raises:
            InputError: no artifact has that name, or several.
        """
        artifacts = self.artifacts()
        kind, _, start = name.rpartition("/")
        matches = [a for a in artifacts if a.path.name.startswith(start) and kind in ("", a.kind)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = ", ".join(a.name for a in matches[:4]) + (", …" if len(matches) > 4 else "")
            raise InputError(f"artifact {name}: {len(matches)} have that name ({several}); give more of it")
        known = [known for a in artifacts for known in (a.name, a.path.name)]
        hint = nearest(name, known) or "`cpo-pipe store ls` lists what is there"
        raise InputError(f"artifact {name}: not in {shown(self.root)}; {hint}")

    def registrations(self) -> tuple[list[Registration], list[Path]]:
        """The runs that used the store, and the damaged files of others."""
        found: list[Registration] = []
        damaged = []
        for file in sorted((self.root / ".runs").glob("[!.]*.json")):
            run = registration(file)
            if run is not None:
                found.append(run)
            elif file.exists():
                damaged.append(file)
        return found, damaged

    def runs(self) -> list[Registration]:
        """The runs that used the store.

        Raises:
            InputError: what one of them registered is damaged, so what it uses is not known.
        """
        found, damaged = self.registrations()
        if damaged:
            raise InputError(
                f"{damaged[0]}: damaged, so what its run uses is not known; run your recipes again, which writes these "
                "files again, or delete it if its run folder is not needed any more"
            )
        return found

    def used(self, forgotten: Collection[str] = ()) -> frozenset[str]:
        """Names of the artifacts that a run uses, as registered at this moment, but for those of the `forgotten` runs.

        A run folder that is missing may have been moved: what it used stays.
        """
        return frozenset().union(*(run.artifacts for run in self.runs() if run.name not in forgotten))

    def in_progress(self) -> list[Path]:
        """The saved states of trainings that are not finished, on this machine."""
        folders = [folder / ".in-progress" for folder in _children(self._local) if folder.is_dir()]
        return sorted(state for folder in folders for training in _children(folder) for state in _children(training)
                      if state.is_dir() and not state.name.startswith("."))  # fmt: skip

    def units(self) -> list["Unit"]:
        """All that a lock of its own guards: the artifacts, and the leftovers of some that are not there."""
        return [
            Unit(self.root / kind / address, self._local / kind / address)
            for kind in self._kinds()
            for address in self._addresses(kind)
        ]

    def _kinds(self) -> list[str]:
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(folders, key=lambda name: KINDS.index(name) if name in KINDS else len(KINDS))

    def _addresses(self, kind: str) -> list[str]:
        """All that a name in the kind's folder mentions: of artifacts, half-made and damaged ones, and states."""
        folders = [root / kind / part for root in {self.root, self._local} for part in ("", ".in-progress")]
        form = re.compile(rf"(?:\.tmp-[0-9a-f]+-)?({_ADDRESS.pattern})(?:\.damaged-\d+)?")
        matches = (form.fullmatch(path.name) for folder in folders for path in _children(folder))
        return sorted({match[1] for match in matches if match})


# ── soundness ────────────────────────────────────────────────────────────────────────────────────────────────────


def faults(artifact: Artifact, advance: Callable[[int], None]) -> Iterator[str]:
    """What is wrong with an artifact, found by reading all of it, a shard at a time; changes nothing.

    Args:
        artifact: what is read.
        advance: called with the size of each file once it is read.
    """
    if artifact.spec is None or address(artifact.spec) != artifact.path.name:
        what = "is gone or unreadable" if artifact.spec is None else f"is that of {address(artifact.spec)}"
        yield f"spec.json {what}; that harms no run, but nothing says any more what the artifact is"
    if artifact.table:
        for name, manifest in artifact.shards.items():
            fault = _shard_fault(artifact, name, manifest, artifact.table)
            if fault and (artifact.path / "manifests" / f"{name}.json").exists():  # else it was merged just now
                yield f"shard {name}: {fault}"
            advance(manifest.get("bytes", 0))
        return
    if (owner := artifact.manifest.get("artifact", artifact.name)) != artifact.name:
        yield f"manifest.json is that of {owner}"
    if not artifact.manifest:
        yield "manifest.json is gone or unreadable, or lists no files"
    for name, size in artifact.files.items():
        if fault := _file_fault(artifact, name):
            yield f"{name}: {fault}"
        advance(size)


def _shard_fault(artifact: Artifact, name: str, manifest: Record, table: Table) -> str | None:
    if not manifest:
        return "its manifest is unreadable"
    try:
        content = (artifact.path / "shards" / f"{name}.parquet").read_bytes()
    except FileNotFoundError:
        return "its file is gone"
    if len(content) != manifest["bytes"]:
        return f"it has {len(content)} bytes instead of {manifest['bytes']}"
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        return "its checksum differs"
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as parquet:
            if fault := foreign(parquet, artifact.name) or _table_fault(parquet, table.schema, manifest["rows"]):
                return fault
            keys = parquet.read(columns=list(table.key))
    except pa.ArrowException as error:
        return f"it cannot be read ({cause(error)})"
    distinct = keys.group_by(list(table.key)).aggregate([]).num_rows
    return f"{keys.num_rows - distinct} row keys stand twice in it" if distinct != keys.num_rows else None


def _file_fault(artifact: Artifact, name: str) -> str | None:
    file = artifact.path / name
    if not file.is_file():
        return "it is gone"
    if sha256_file(file) != artifact.manifest["files"][name]:
        if isinstance(file, Path):
            distrust(file)  # a cached hash of it would hide the damage from the next run
        return "its checksum differs"
    schema = _PRODUCT_TABLES.get((artifact.kind, name))
    if schema is None:
        return None
    try:
        with file.open("rb") as opened, pq.ParquetFile(opened) as parquet:
            return _table_fault(parquet, schema, artifact.rows if name == "examples.parquet" else None)
    except pa.ArrowException as error:
        return f"it cannot be read ({cause(error)})"


def run_faults(run: Registration) -> Iterator[str]:
    """What is wrong in a run's folder; changes nothing."""
    record = run_record(run.run_dir)
    if record is not None:
        yield from (f"{name}: gone or changed" for name in changed_files(run.run_dir, record))
    elif (run.run_dir / "run.json").exists():
        yield "run.json: unreadable"


def _table_fault(parquet: pq.ParquetFile, schema: pa.Schema, rows: int | None) -> str | None:
    found = parquet.metadata.num_rows
    if rows is not None and found != rows:
        return f"it has {found} rows instead of {rows}"
    return _schema_fault(parquet.schema_arrow, schema)


def _schema_fault(found: pa.Schema, schema: pa.Schema) -> str | None:
    """What is not as data/schemas.py has it; the documentation of a column may be."""
    if found.equals(schema):
        return None
    for name in dict.fromkeys([*schema.names, *found.names]):
        here, there = (part.field(name) if name in part.names else None for part in (found, schema))
        if here is None or there is None or not here.equals(there):
            return f"its column {name} is {_type(here)}, but of this version {_type(there)}"
    return "its columns are in another order than this version's"


def _type(field: pa.Field | None) -> str:
    return "absent" if field is None else f"{field.type}{'' if field.nullable else ' not null'}"


# ── what nothing needs ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go."""

    path: Path
    why: str

    @property
    def size(self) -> int:
        """Of all its files, in bytes."""
        return _size_below(self.path)


@dataclass(frozen=True)
class Unit:
    """All that one lock guards: an artifact, and what processes that made it left behind."""

    path: Path
    """Where the artifact is, or would be."""
    local: Path
    """Where this machine keeps its copy, if the store is remote; else the same."""

    @property
    def name(self) -> str:
        """Kind and address, as messages name it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def paid(self) -> bool:
        """Whether it holds answers of an API, which cost money to make again; also where nothing says what it holds.

        So does the date in the prompts of such answers: with another date all of them would be asked for again.
        """
        artifact = Artifact(self.path)
        if artifact.kind == "chat-dates":
            return True
        if artifact.kind not in _ANSWERS or not _stands(self.path):
            return False
        spec = artifact.spec
        of = spec.get("of", spec) if spec is not None else None
        # In the place of a model's fingerprint there is what identifies the API.
        return not isinstance(of, dict) or any(isinstance(of.get(name), dict) for name in ("generator", "model", "api"))

    @property
    def lock(self) -> Path:
        """The lock file that whoever makes the artifact holds."""
        folder = self.local if self.path.parent.name in TABLES else self.local.parent / ".locks" / self.path.name
        return folder / "lock"

    @contextmanager
    def held(self, *, make: bool) -> Iterator[bool]:
        """Hold the lock, without waiting; yields whether nobody else does. Makes its file only where told to."""
        if make:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
        elif not self.lock.exists():
            yield True
            return
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def garbage(self, used: bool) -> list[Garbage]:
        """What of it can go, given whether a run uses the artifact."""
        folder, address = self.local.parent, self.path.name
        unfinished = folder / ".in-progress" / address
        found = [Garbage(path, "left by a process that was killed") for path in folder.glob(f".tmp-*-{address}")]
        found += [Garbage(path, "set aside as damaged") for path in folder.glob(f"{address}.damaged-*")]
        if not used:
            found += [
                Garbage(path, "no run uses it") for path in dict.fromkeys((self.path, self.local)) if _stands(path)
            ]
            if unfinished.exists():
                found.append(Garbage(unfinished, "unfinished, and no run uses it"))
        elif unfinished.exists() and (self.path / "manifest.json").exists():
            found.append(Garbage(unfinished, "state of a training that is finished"))
        if used and self.path.parent.name in TABLES:
            found += self._row_leftovers()
        return found

    def _row_leftovers(self) -> Iterator[Garbage]:
        if (self.path / "damaged").exists():
            yield Garbage(self.path / "damaged", "set aside as damaged")
        if self.path != self.local:  # no lock says whether another machine is about to record a shard
            return
        recorded = {path.stem for path in self.path.glob("manifests/[!.]*.json")}
        for shard in sorted(self.path.glob("shards/[!.]*.parquet")):
            if shard.stem not in recorded:
                yield Garbage(shard, "a shard that was never recorded")
        for scratch in sorted([*self.path.rglob(".tmp-*"), *self.path.glob("worklist-*")]):
            yield Garbage(scratch, "left by a process that was killed")

    def delete(self, garbage: Iterable[Garbage]) -> None:
        """Delete it; to be called while the lock is held."""
        for item in garbage:
            self._delete(item.path)

    def _delete(self, path: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        # A shard without its manifest does not exist, nor does such a product: half gone is gone for every reader.
        for child in sorted(path.iterdir(), key=lambda child: not child.name.startswith("manifest")):
            if child != self.lock:  # it may be waited for
                self._delete(child)
        if path != self.lock.parent and isinstance(path, Path):  # object stores have no empty folders
            path.rmdir()


# ── differences ──────────────────────────────────────────────────────────────────────────────────────────────────

ABSENT = object()
"""Stands in a difference for a value that one side lacks."""


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The path and both values of each place where two JSON values differ, as deep as both go."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(value, dict | list) for value in [*a, *b]):
        for place in range(max(len(a), len(b))):
            one, other = (values[place] if place < len(values) else ABSENT for values in (a, b))
            yield from differences(one, other, f"{path}[{place}]")
    elif ABSENT in (a, b) or canonical_json(a) != canonical_json(b):  # 1 and 1.0 have different addresses
        yield path, a, b


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shard_manifests(paths: list[Path]) -> list[dict[str, Any]]:
    if not paths or isinstance(paths[0], Path):  # where threads would cost more than they save
        return list(map(_shard_manifest, paths))
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(_shard_manifest, paths))


def _shard_manifest(path: Path) -> Record:
    return shard_manifest(path) or {}


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _stands(path: Path) -> bool:
    """Whether anything of an artifact is there besides its lock."""
    return any(child.name != "lock" for child in _children(path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _size_below(path: Path) -> int:
    return sum(map(_size_below, path.iterdir())) if path.is_dir() else _size(path)
