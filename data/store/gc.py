"""Find and delete what no run needs."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpo_pipe.data.store.folder import ArtifactFolder, children, size_of
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.locks import try_lock
from cpo_pipe.data.store.paths import AnyPath

_ANSWERS = ("negatives", "rejected", "generations", "verdicts", "ratings")
"""Kinds whose rows may be answers of an API."""


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go."""

    path: AnyPath
    why: str

    @property
    def size(self) -> int:
        """Return the size of all its files, in bytes."""
        return _size_below(self.path)


@dataclass
class Collected:
    """What a collection found."""

    garbage: list[tuple[Garbage, int]] = field(default_factory=list)
    """What can go (or went), with its size in bytes."""
    busy: list[str] = field(default_factory=list)
    """Names of the artifacts that a process is making."""
    paid: list[tuple[str, int]] = field(default_factory=list)
    """Names and sizes of the artifacts that no run uses, kept because their answers cost money."""


def collect(inventory: Inventory, *, delete: bool, forgotten: Collection[str] = (), paid: bool = False) -> Collected:
    """Find what can go, and delete it if asked to.

    Args:
        inventory: of the store.
        delete: delete what is found.
        forgotten: names of runs to ignore.
        paid: also answers of an API.
    """
    collected = Collected()
    used = inventory.used(forgotten)
    for artifact in inventory.folders():
        keep = artifact.name in used
        if not keep and not paid and is_paid(artifact):
            collected.paid.append((artifact.name, artifact.size))
            keep = True
        if not garbage_of(artifact, keep):
            continue
        with try_lock(artifact.lock, make=delete) as held:
            if not held:
                collected.busy.append(artifact.name)
                continue
            # Again, now that nobody can begin to make it: what was registered or recorded meanwhile stays.
            garbage = garbage_of(artifact, keep or artifact.name in inventory.used(forgotten))
            collected.garbage += [(item, item.size) for item in garbage]
            if delete:
                delete_garbage(artifact, garbage)
    return collected


def is_paid(artifact: ArtifactFolder) -> bool:
    """Return whether it holds answers of an API, which cost money to make again; also if its spec is gone.

    The date in the prompts of such answers counts too: with another date all of them would be requested again.
    """
    if artifact.kind == "chat-dates":
        return True
    if artifact.kind not in _ANSWERS or not artifact.exists():
        return False
    spec = artifact.spec
    of = spec.get("of", spec) if spec is not None else None
    # In the place of a model's fingerprint there is what identifies the API.
    return not isinstance(of, dict) or any(isinstance(of.get(name), dict) for name in ("generator", "model", "api"))


def garbage_of(artifact: ArtifactFolder, used: bool) -> list[Garbage]:
    """Return what can go of an artifact, given whether a run uses it."""
    folder, hash_ = artifact.local.parent, artifact.path.name
    unfinished = artifact.in_progress
    found = [Garbage(path, "left by a process that was killed") for path in folder.glob(f".tmp-*-{hash_}")]
    found += [Garbage(path, "quarantined") for path in folder.glob(f"{hash_}.damaged-*")]
    if not used:
        copies = dict.fromkeys((artifact, ArtifactFolder(artifact.local, artifact.local)))
        found += [Garbage(copy.path, "no run uses it") for copy in copies if copy.exists()]
        if unfinished.exists():
            found.append(Garbage(unfinished, "unfinished, and no run uses it"))
    elif unfinished.exists() and (artifact.path / "manifest.json").exists():
        found.append(Garbage(unfinished, "state of a training that is finished"))
    if used and artifact.table:
        found += _row_leftovers(artifact)
    return found


def _row_leftovers(artifact: ArtifactFolder) -> Iterator[Garbage]:
    if (artifact.path / "damaged").exists():
        yield Garbage(artifact.path / "damaged", "quarantined")
    if artifact.path != artifact.local:  # no lock says whether another machine is about to record a shard
        return
    recorded = artifact.recorded()
    for shard in sorted(artifact.local.glob("shards/[!.]*.parquet")):
        if shard.stem not in recorded:
            yield Garbage(shard, "a shard that was never recorded")
    for scratch in sorted([*artifact.local.rglob(".tmp-*"), *artifact.local.glob("worklist-*")]):
        yield Garbage(scratch, "left by a process that was killed")


def delete_garbage(artifact: ArtifactFolder, garbage: Iterable[Garbage]) -> None:
    """Delete it; call while the lock is held."""
    for item in garbage:
        _delete(item.path, artifact.lock)


def _delete(path: AnyPath, lock: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    # A shard without its manifest does not exist, nor does such an artifact: half gone is gone for every reader.
    for child in sorted(children(path), key=lambda child: not child.name.startswith("manifest")):
        if child != lock:  # it may be waited for
            _delete(child, lock)
    if path != lock.parent and isinstance(path, Path):  # object stores have no empty folders
        path.rmdir()


def _size_below(path: AnyPath) -> int:
    return sum(map(_size_below, path.iterdir())) if path.is_dir() else size_of(path)
