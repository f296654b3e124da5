"""The folders of runs: `runs/NAME/TIME-HASH` for each version of a recipe, and `runs/NAME/latest`, a link to one."""

import os
import re
import time
from pathlib import Path

from cpo_pipe.data.fingerprint import digest

RUNS = Path("runs")
LATEST = "latest"
_VERSION = re.compile(r"\d{8}-\d{4}-([0-9a-f]{6})")


def run_folder(name: str, recipe: str, root: Path = RUNS) -> Path:
    """Return the folder of a recipe's run: the one that it had before, or a new one, named by time and content.

    Args:
        name: of the recipe.
        recipe: its text, as it is written into the folder.
        root: where the folders of all recipes are.
    """
    key = digest(recipe)[:6]
    before = [path for path in versions(root / name) if path.name.endswith(key)]
    return before[-1] if before else root / name / f"{time.strftime('%Y%m%d-%H%M')}-{key}"


def versions(folder: Path) -> list[Path]:
    """Return the run folders of a recipe, the oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def link_latest(run_dir: Path) -> None:
    """Let `latest` beside a run folder lead to it; a folder that the user named gets no link."""
    if not _VERSION.fullmatch(run_dir.name):
        return
    link = run_dir.parent / LATEST
    if link.is_symlink() and os.readlink(link) == run_dir.name:
        return
    scratch = run_dir.parent / f".{LATEST}-{os.getpid()}"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(run_dir.name)
    scratch.replace(link)
