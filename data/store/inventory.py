"""What a store holds, as its folders, specs and manifests say.

A run registers each artifact before it makes or reads it, so that "no run needs it" takes no walk from spec to spec:

    <root>/.runs/*.json   one per run folder: {"run_dir": …, "host": …, "artifacts": ["kind/hash", …]}
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store.folder import ArtifactFolder, children
from cpo_pipe.data.store.paths import is_local, local_folder, local_root, open_root, shown
from cpo_pipe.data.store.records import Registration, registration
from cpo_pipe.data.text import nearest

KINDS = (
    "tokenizers",
    "chat-dates",
    "examples",
    "negatives",
    "ratings",
    "groups",
    "rejected",
    "reference-logprobs",
    "checkpoints",
    "generations",
    "verdicts",
    "metrics",
)
"""In the order in which a run makes them."""

_HASH = re.compile(r"[0-9a-f]{16}")


class Inventory:
    """The artifacts and registered runs of a store. Creates nothing, not even the folder.

    Args:
        root: as of `Store`.

    Raises:
        InputError: the folder does not exist, or the URL cannot be reached.
    """

    def __init__(self, root: str | Path):
        if is_local(root) and not local_root(root).is_dir():
            raise InputError(f"--store {root}: no such folder; give the store of a run")
        opened: Any = open_root(root)
        self.root: Path = opened  # or a UPath, whose methods are the same
        self._local = local_folder(self.root)

    def artifacts(self, kind: str | None = None) -> list[ArtifactFolder]:
        """Return all of them, or those of one kind, in the order in which a run makes them.

        Raises:
            InputError: the store has nothing of this kind.
        """
        kinds = self._kinds()
        if kind is not None and kind not in kinds:
            hint = nearest(kind, kinds) or f"there are {', '.join(kinds) or 'none'}"
            raise InputError(f"kind {kind}: nothing of it in {shown(self.root)}; {hint}")
        return [
            folder
            for name in ([kind] if kind else kinds)
            for path in sorted((self.root / name).iterdir())
            if _HASH.fullmatch(path.name) and (folder := self._folder(name, path.name)).exists()
        ]

    def find(self, name: str) -> ArtifactFolder:
        """Return the artifact of a name: kind/hash, or the start of the hash, with or without its kind.

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
        hint = nearest(name, known) or "`cpo-pipe store ls` lists the artifacts"
        raise InputError(f"artifact {name}: not in {shown(self.root)}; {hint}")

    def registrations(self) -> tuple[list[Registration], list[Path]]:
        """Return the runs that used the store, and the damaged files of others."""
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
        """Return the runs that used the store.

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
        """Return the names of the artifacts that the runs use now, without those of the `forgotten` runs.

        A run folder that is missing may have been moved: what it used stays.
        """
        return frozenset().union(*(run.artifacts for run in self.runs() if run.name not in forgotten))

    def in_progress(self) -> list[Path]:
        """Return the saved states of trainings that are not finished, on this machine."""
        folders = [folder / ".in-progress" for folder in children(self._local) if folder.is_dir()]
        return sorted(state for folder in folders for training in children(folder) for state in children(training)
                      if state.is_dir() and not state.name.startswith("."))  # fmt: skip

    def folders(self) -> list[ArtifactFolder]:
        """Return the folders that have a lock of their own: artifacts, and leftovers of absent ones."""
        return [self._folder(kind, hash_) for kind in self._kinds() for hash_ in self._hashes(kind)]

    def _folder(self, kind: str, hash_: str) -> ArtifactFolder:
        return ArtifactFolder(self.root / kind / hash_, self._local / kind / hash_)

    def _kinds(self) -> list[str]:
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(folders, key=lambda name: KINDS.index(name) if name in KINDS else len(KINDS))

    def _hashes(self, kind: str) -> list[str]:
        """Return all hashes in the names of a kind's folder: of artifacts, unfinished and damaged ones, and states."""
        folders = [root / kind / part for root in {self.root, self._local} for part in ("", ".in-progress")]
        form = re.compile(rf"(?:\.tmp-[0-9a-f]+-)?({_HASH.pattern})(?:\.damaged-\d+)?")
        matches = (form.fullmatch(path.name) for folder in folders for path in children(folder))
        return sorted({match[1] for match in matches if match})
